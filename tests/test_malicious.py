"""Directories made to harm: all are refused or harmless, and a canary file that each tries to write never appears."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

import composed
import isthmus
import tiny
from composed import picture
from isthmus import parts
from isthmus.config import read
from isthmus.torchfile import read_tensors
from isthmus.types import ConfigError, IsthmusError, Sample, Turn

GADGETS = {
    "os.system": ("posix", "system", "shell"),
    "os.popen": ("os", "popen", "shell"),
    "subprocess.getoutput": ("subprocess", "getoutput", "shell"),
    "subprocess.call-list": ("subprocess", "call", "list"),
    "subprocess.Popen-list": ("subprocess", "Popen", "list"),
    "pty.spawn": ("pty", "spawn", "list"),
    "eval": ("builtins", "eval", "python"),
    "exec": ("builtins", "exec", "python"),
    "timeit.timeit": ("timeit", "timeit", "python"),
    "timeit.repeat": ("timeit", "repeat", "python"),
    "cProfile.run": ("cProfile", "run", "python"),
    "profile.run": ("profile", "run", "python"),
    "pdb.run": ("pdb", "run", "python"),
    "doctest.debug_script": ("doctest", "debug_script", "python"),
    "code.interact": ("code", "interact", "python"),
    "numpy.runstring": ("numpy.testing._private.utils", "runstring", "python"),
    "torch.load": ("torch", "load", "path"),
    "torch.hub": ("torch.hub", "load", "path"),
    "torch.ops": ("torch._ops", "load_library", "path"),
    "ctypes.CDLL": ("ctypes", "CDLL", "path"),
    "runpy.run_path": ("runpy", "run_path", "path"),
    "pickle.loads": ("pickle", "loads", "shell"),
    "importlib": ("importlib", "import_module", "path"),
    "pip.main": ("pip", "main", "list"),
    "shutil.rmtree": ("shutil", "rmtree", "path"),
    "pathlib.touch": ("pathlib", "Path.touch", "path"),
    "io.open": ("io", "open", "path"),
    "getattr": ("builtins", "getattr", "python"),
}
"""What pickles call to run code; half of them pass scanners that know a list of names."""
LIVE = ("os.system", "subprocess.call-list", "eval", "exec", "cProfile.run")


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    """A path that must not exist at the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    composed.model("llama").save_pretrained(folder, whole=True)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A whole model with no manifest, which an attacker would write anew."""
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    (folder / "manifest.json").unlink()
    return folder


def gadget(name: str, canary: Path) -> bytes:
    """A pickle that calls one function on its way, written opcode by opcode."""
    module, function, form = GADGETS[name]
    python = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    words = {"shell": f"touch {canary}", "python": python, "path": str(canary)}
    argument = b"".join(
        [b"(", *(f"V{word}\n".encode() for word in ("touch", str(canary))), b"l"]
        if form == "list"
        else [f"V{words[form]}\n".encode()]
    )
    return f"c{module}\n{function}\n(".encode() + argument + b"tR."


@pytest.mark.parametrize("name", LIVE)
def test_the_gadgets_are_live(name: str, tmp_path: Path) -> None:
    harmless = tmp_path / "harmless"
    pickle.loads(gadget(name, harmless))  # noqa: S301 - in the test alone, to prove that the payloads work
    assert harmless.exists()


@pytest.mark.parametrize("name", GADGETS)
def test_pickles_are_never_loaded(name: str, copy: Path, canary: Path) -> None:
    evil = gadget(name, canary)
    weights = copy / "model.safetensors"
    weights.write_bytes(evil)  # a pickle under a name that is trusted
    with pytest.raises(IsthmusError, match="cannot be read"):
        isthmus.load(copy)
    weights.unlink()
    for ending in ("pytorch_model.bin", "model.pt", "model.pt2", "model.ckpt", "model.pth"):
        (copy / ending).write_bytes(evil)
    with pytest.raises(IsthmusError, match="no safetensors weights"):
        isthmus.load(copy)
    with pytest.raises(IsthmusError, match="not a plain legacy state dict"):
        read_tensors(copy / "model.pt")


@pytest.mark.parametrize("name", ["os.system", "eval", "torch.load"])
@pytest.mark.parametrize("part", ["llm", "vision"])
def test_base_parts_of_pickles_are_refused(name: str, part: str, tmp_path: Path, canary: Path) -> None:
    folder = tiny.llm_folder(tmp_path / "part") if part == "llm" else tiny.vision_folder(tmp_path / "part")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(gadget(name, canary))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe = composed.recipe().but(**{"llm" if part == "llm" else "encoder": {"source": str(folder)}})
    with pytest.raises(ConfigError, match="leads to 'pytorch_model.bin'"):
        isthmus.compose(recipe)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(Exception, match="safetensors"):
        isthmus.compose(recipe)


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/passwd", "x/model.safetensors", "a.bin", 7])
def test_an_index_leads_nowhere_else(shard: object, tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="leads to|damaged"):
        parts.folder(str(tmp_path))


# ---------------------------------------------------------------------------------------------- code by name

FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")
CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoTokenizer",
           "AutoProcessor", "AutoImageProcessor")  # fmt: skip


def poison(folder: Path, file: str, canary: Path, **more: Any) -> None:
    """Point every auto class in a file at code that lies beside it."""
    (folder / "evil.py").write_text(f"__import__('pathlib').Path({str(canary)!r}).touch()\nclass Evil: pass\n")
    tree = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(tree | {"auto_map": dict.fromkeys(CLASSES, "evil.Evil")} | more))


@pytest.mark.parametrize("file", FILES)
def test_code_beside_a_model_is_not_run(file: str, copy: Path, canary: Path) -> None:
    poison(copy, file, canary)
    if file == "tokenizer_config.json":
        tree = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(tree | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    isthmus.load(copy)
    AutoProcessor.from_pretrained(copy, trust_remote_code=False)


@pytest.mark.parametrize("part", ["llm", "vision"])
def test_an_architecture_that_only_its_own_code_knows_is_refused(part: str, tmp_path: Path, canary: Path) -> None:
    folder = tiny.llm_folder(tmp_path / "part") if part == "llm" else tiny.vision_folder(tmp_path / "part")
    poison(folder, "config.json", canary, model_type="evil")
    recipe = composed.recipe().but(**{"llm" if part == "llm" else "encoder": {"source": str(folder)}})
    with pytest.raises((IsthmusError, ValueError), match=r"evil|trust_remote_code|custom code"):
        isthmus.compose(recipe)


@pytest.mark.parametrize("joint", ["os", "subprocess.call", "../../evil", "evil", "/tmp/evil.py"])
def test_a_joint_is_a_known_name_and_no_import_path(joint: str, copy: Path, canary: Path) -> None:
    (copy / "evil.py").write_text(f"__import__('pathlib').Path({str(canary)!r}).touch()\n")
    tree = json.loads((copy / "config.json").read_text())
    tree["aligner"]["name"] = joint
    (copy / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError):
        isthmus.load(copy)


# ---------------------------------------------------------------------------------------------- text that computes

TEMPLATES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages)[0].x.y() }}",
    "attr filter": "{{ (messages|attr('__class__')).__mro__ }}",
    "import": "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "include": "{% include '/etc/passwd' %}",
    "mutation": "{{ messages.append(messages) }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_cannot_leave_its_sandbox(name: str, copy: Path, canary: Path) -> None:
    evil = TEMPLATES[name].replace("CANARY", str(canary))
    (copy / "chat_template.jinja").write_text(evil)
    model = isthmus.load(copy)
    assert model.processor.tokenizer.chat_template == evil
    with pytest.raises(Exception, match=r"(?i)unsafe|no loader|refuses|template|undefined|attribute"):
        model.processor.prompts([Sample((Turn.say("user", picture(1), "hi"),))])


YAMLS = {
    "apply": "!!python/object/apply:os.system ['touch CANARY']",
    "new": "!!python/object/new:os.system ['touch CANARY']",
    "name": "seed: !!python/name:os.system",
    "module": "seed: !!python/module:os",
    "nested": "llm: {source: !!python/object/apply:subprocess.getoutput ['touch CANARY']}",
}


@pytest.mark.parametrize("name", YAMLS)
def test_a_recipe_makes_no_objects(name: str, tmp_path: Path, canary: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(YAMLS[name].replace("CANARY", str(canary)))
    with pytest.raises(ConfigError, match="cannot be read"):
        read(file)


# ---------------------------------------------------------------------------------------------- damaged tensors


def tensors(header: str | bytes, body: bytes = b"\0" * 32, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def one(start: int, end: int, shape: object = (4,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def many(**entries: dict[str, object]) -> bytes:
    return tensors(json.dumps(entries))


ENTRY = json.dumps(one(0, 16))
SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "overlap": lambda: many(a=one(0, 16), b=one(8, 24)),
    "same bytes": lambda: many(a=one(0, 16), b=one(0, 16), c=one(16, 32)),
    "hole": lambda: many(a=one(0, 16), b=one(20, 32, [3])),
    "not from the start": lambda: many(a=one(16, 32)),
    "bytes left over": lambda: many(a=one(0, 16)),
    "beyond the end": lambda: many(a=one(0, 64, [16])),
    "backwards": lambda: many(a=one(16, 0)),
    "negative offset": lambda: many(a=one(-16, 16, [8])),
    "negative shape": lambda: many(a=one(0, 32, [-8])),
    "two negatives": lambda: many(a=one(0, 32, [-2, -4])),
    "shape that overflows": lambda: many(a=one(0, 32, [2**62, 8])),
    "shape and size differ": lambda: many(a=one(0, 32, [3])),
    "fraction": lambda: many(a=one(0, 32, [8.5])),
    "unknown dtype": lambda: many(a=one(0, 32, [8], "PICKLE")),
    "huge header": lambda: tensors(b"{}", length=2**40),
    "header of all ones": lambda: tensors(b"{}", length=2**64 - 1),
    "header past the end": lambda: tensors(b"{}", b"", length=3),
    "no JSON": lambda: tensors("__import__('os')"),
    "no mapping": lambda: tensors("[1, 2]"),
    "broken UTF-8": lambda: tensors(b'{"\xff\xfe": 1}'),
    "deep nesting": lambda: tensors("[" * 100_000),
    "zip": lambda: b"PK\3\4" + b"\0" * 60,
    "empty": lambda: b"",
    "seven bytes": lambda: b"\0" * 7,
    "duplicate key": lambda: tensors(f'{{"a": {ENTRY}, "a": {json.dumps(one(16, 32))}}}'),
    "duplicate key, same bytes": lambda: tensors(f'{{"a": {ENTRY}, "a": {ENTRY}}}', b"\0" * 16),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_damaged_tensors_are_refused_by_their_file(name: str, copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(SAFETENSORS[name]())
    with pytest.raises(IsthmusError, match="cannot be read") as refused:
        isthmus.load(copy)
    assert str(copy) in refused.value.cause

"""Directories of models that were made to harm, and honest ones that come back as they went.

    python benchmarks/attack_checkpoints.py [--json FILE] [--tiny]

M1 writes each directory to disk and loads it as `isthmus serve` would, in a process whose events are audited: a pickle
that is opened, a program that is started, a connection. Each must be refused (a chat template: at the
first prompt), and a canary file that each tries to write must not exist. M2 saves a tiny model of every joint, loads it
and saves it again, whole and as a difference to its parts: every file must be equal, byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
from attacked import TESTS

FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.getaddrinfo", "pickle.find_class", "shutil.rmtree", "ctypes.dlopen", "webbrowser.open",
}  # fmt: skip
"""Events of Python's audit that loading a model has no reason for, once everything is imported."""
WEIGHTS = (
    "pytorch_model.bin",
    "model.pt",
    "model.pt2",
    "model.ckpt",
    "model.pth",
    "training_args.bin",
    "x.mdl",
    "scaler.pkl",
)
Attack = tuple[str, str, Callable[[Path, Path], Callable[[], object]]]
"""A family, a name, and what writes the directory and gives what would load it."""


def attacks(honest: Path) -> Iterator[Attack]:
    """Every directory."""
    import malicious as evil

    for name in evil.GADGETS:
        yield "pickle named safetensors", name, lambda at, canary, n=name: _weights(honest, at, evil.gadget(n, canary))
        yield "pickle as weights", name, lambda at, canary, n=name: _pickles(honest, at, evil.gadget(n, canary))
        yield "pickle behind an index", name, lambda at, canary, n=name: _index(honest, at, evil.gadget(n, canary))
    for name, made in evil.SAFETENSORS.items():
        yield "safetensors that lie", name, lambda at, canary, m=made: _weights(honest, at, m())
    for joint in ("os", "subprocess.call", "../../evil", "evil", "/tmp/evil.py"):
        yield "a joint by import path", joint, lambda at, canary, j=joint: _joint(honest, at, canary, j)
    for part in ("llm", "vision"):
        yield "auto_map of an unknown model", part, lambda at, canary, p=part: _part(at, canary, p)
    for name, text in evil.TEMPLATES.items():
        yield "chat template", name, lambda at, canary, t=text: _template(honest, at, t.replace("CANARY", str(canary)))
    for name, text in evil.YAMLS.items():
        yield "recipe", name, lambda at, canary, t=text: _recipe(at, t.replace("CANARY", str(canary)))
    for file in evil.FILES:
        yield "auto_map, ignored", file, lambda at, canary, f=file: _ignored(honest, at, canary, f)


def _copy(honest: Path, at: Path) -> Path:
    """A whole model with no manifest, which an attacker would write anew."""
    folder = Path(shutil.copytree(honest, at / "model"))
    (folder / "manifest.json").unlink()
    return folder


def _load(folder: Path) -> Callable[[], object]:
    import isthmus

    return lambda: isthmus.load(folder)


def _weights(honest: Path, at: Path, raw: bytes) -> Callable[[], object]:
    folder = _copy(honest, at)
    (folder / "model.safetensors").write_bytes(raw)
    return _load(folder)


def _pickles(honest: Path, at: Path, raw: bytes) -> Callable[[], object]:
    folder = _copy(honest, at)
    (folder / "model.safetensors").unlink()
    for name in WEIGHTS:
        (folder / name).write_bytes(raw)
    return _load(folder)


def _index(honest: Path, at: Path, raw: bytes) -> Callable[[], object]:
    folder = _copy(honest, at)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(raw)
    index = {"metadata": {}, "weight_map": {"llm.model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return _load(folder)


def _joint(honest: Path, at: Path, canary: Path, joint: str) -> Callable[[], object]:
    folder = _copy(honest, at)
    (folder / "evil.py").write_text(f"__import__('pathlib').Path({str(canary)!r}).touch()\n")
    tree = json.loads((folder / "config.json").read_text())
    tree["aligner"]["name"] = joint
    (folder / "config.json").write_text(json.dumps(tree))
    return _load(folder)


def _part(at: Path, canary: Path, part: str) -> Callable[[], object]:
    import composed
    import isthmus
    import malicious
    import tiny

    folder = tiny.llm_folder(at / "part") if part == "llm" else tiny.vision_folder(at / "part")
    malicious.poison(folder, "config.json", canary, model_type="evil")
    recipe = composed.recipe().but(**{"llm" if part == "llm" else "encoder": {"source": str(folder)}})
    return lambda: isthmus.compose(recipe)


def _template(honest: Path, at: Path, text: str) -> Callable[[], object]:
    from isthmus.types import Sample, Turn

    folder = _copy(honest, at)
    (folder / "chat_template.jinja").write_text(text)
    load = _load(folder)
    return lambda: load().processor.prompts([Sample((Turn.say("user", "hi"),))])  # type: ignore[attr-defined]


def _recipe(at: Path, text: str) -> Callable[[], object]:
    from isthmus.config import read

    (at / "recipe.yaml").write_text(text)
    return lambda: read(at / "recipe.yaml")


def _ignored(honest: Path, at: Path, canary: Path, file: str) -> Callable[[], object]:
    """Code beside a model that is otherwise whole: it loads, and the code is not run."""
    import malicious

    folder = _copy(honest, at)
    malicious.poison(folder, file, canary)
    return _load(folder)


def refused(every: int) -> dict[str, Any]:
    """M1, in this process; every `every`-th directory."""
    import composed

    seen: list[str] = []
    families: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="isthmus-evil-") as scratch:
        composed.model("llama").save_pretrained(Path(scratch) / "honest", whole=True)
        _load(Path(scratch) / "honest")()
        sys.addaudithook(lambda event, _: seen.append(event) if event in FORBIDDEN else None)
        for number, (family, name, make) in enumerate(list(attacks(Path(scratch) / "honest"))[::every]):
            at, canary = Path(scratch) / f"{number:03d}", Path(scratch) / f"canary{number}"
            at.mkdir()
            act = make(at, canary)
            seen.clear()
            outcome, told = _outcome(act)
            found, events = canary.exists() or any(at.rglob("canary*")), list(seen)
            shutil.rmtree(at)
            families.setdefault(family, Counter())[outcome] += 1
            right = "loaded" if family == "auto_map, ignored" else "refused"
            if outcome != right or found or events:
                wrong.append(f"{family}: {name}: {outcome} {told}{', canary' if found else ''} {events}")
    return {"families": families, "wrong": wrong}


def _outcome(act: Callable[[], object]) -> tuple[str, str]:
    try:
        act()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        return "refused", f"{type(error).__name__}: {str(error)[:100]}"
    return "loaded", ""


def round_trips(joints: int | None) -> dict[str, Any]:
    """M2, in this process: joints and forms, and files that came back other than they went."""
    import isthmus
    from test_contract import JOINTS, grown

    found: dict[str, Any] = {"files": 0, "forms": 0, "different": []}
    chosen = {name: joint for name, joint in JOINTS.items() if joint.aligner not in ("aside", "shared")}
    for name, joint in list(chosen.items())[:joints]:
        model = grown(name, joint.families[0])
        for whole in (True, False):
            with tempfile.TemporaryDirectory(prefix="isthmus-trip-") as scratch:
                first, second = Path(scratch) / "first", Path(scratch) / "second"
                model.save_pretrained(first, whole=whole)
                isthmus.load(first).save_pretrained(second, whole=whole)
                a, b = _hashes(first), _hashes(second)
            found["forms"] += 1
            found["files"] += len(a)
            found["different"] += [f"{name} {f}" for f in sorted(a.keys() | b.keys()) if a.get(f) != b.get(f)]
    return found


def _hashes(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main(arguments: list[str] | None = None) -> int:
    """Run both, print a table, write what was found; 1 if a directory got anywhere or a file changed."""
    options = harness.parser(__doc__, 1, "unused").parse_args(arguments)
    result: dict[str, Any] = {"machine": harness.machine()}
    evil = harness.child(Path(__file__), {"attack": "M1", "size": 7 if options.tiny else 1})
    trips = harness.child(Path(__file__), {"attack": "M2", "size": 2 if options.tiny else None})
    result |= {"M1": evil, "M2": trips}
    print(harness.in_words(result["machine"]), end="\n\n")
    rows = [["M1", family, str(sum(found.values())), _told(found)] for family, found in evil["families"].items()]
    rows.append(["M1", "all: canaries, events or other outcomes", str(_sum(evil)), f"{len(evil['wrong'])} wrong"])
    trip = f"{len(trips['different'])} of {trips['files']} files differ"
    rows.append(["M2", "save, load, save", f"{trips['forms']} models", trip])
    print(harness.table(["attack", "what", "number", "found"], rows))
    print(
        "\n".join([*evil["wrong"], *trips["different"]]) or f"\n{harness.save('attack_checkpoints', result, options)}"
    )
    return 1 if evil["wrong"] or trips["different"] else 0


def _told(found: dict[str, int]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in found.items())


def _sum(evil: dict[str, Any]) -> int:
    return sum(sum(found.values()) for found in evil["families"].values())


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith("job.json"):
        sys.path.insert(0, str(TESTS))
        job = json.loads(Path(sys.argv[1]).read_text())
        done = {"M1": refused, "M2": round_trips}[job["attack"]](job["size"])
        Path(sys.argv[2]).write_text(json.dumps(done))
    else:
        raise SystemExit(main())

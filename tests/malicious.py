"""What strangers send: pickles that run code, directories and tensors that lie, templates, recipes, and URLs inward.

Tests and `benchmarks/attack_server.py` and `benchmarks/attack_checkpoints.py` share it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")
CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoTokenizer",
           "AutoProcessor", "AutoImageProcessor")  # fmt: skip


def poison(folder: Path, file: str, canary: Path, **more: Any) -> None:
    """Point every auto class in a file at code that lies beside it."""
    (folder / "evil.py").write_text(f"__import__('pathlib').Path({str(canary)!r}).touch()\nclass Evil: pass\n")
    tree = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(tree | {"auto_map": dict.fromkeys(CLASSES, "evil.Evil")} | more))


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
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}",
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "depth": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "long": "{% for a in range(9999) %}" + 16 * "0123456789abcdef" + "{% endfor %}{{ messages[0].content }}",
}


YAMLS = {
    "apply": "!!python/object/apply:os.system ['touch CANARY']",
    "new": "!!python/object/new:os.system ['touch CANARY']",
    "name": "seed: !!python/name:os.system",
    "module": "seed: !!python/module:os",
    "nested": "llm: {source: !!python/object/apply:subprocess.getoutput ['touch CANARY']}",
}


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


HOST = "pictures.example"
PRIVATE = [
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "192.0.2.1", "198.18.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "::", "::1", "::ffff:127.0.0.1",
    "::ffff:169.254.169.254", "::ffff:7f00:1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1",
    "2001:db8::1", "2002:7f00:1::", "2002:a9fe:a9fe::", "64:ff9b::7f00:1", "64:ff9b::169.254.169.254",
    "64:ff9b:1::7f00:1", "::127.0.0.1", "::8.8.8.8", "::ffff:0:127.0.0.1", "fec0::1", "4000::1", "not one", "",
]  # fmt: skip


URLS = [
    "http://169.254.169.254/latest/meta-data/", "http://localhost/", "http://localhost.localdomain", "http://[::1]/",
    "http://[::ffff:127.0.0.1]/", "http://[::]:80/", "http://0.0.0.0/", "http://0/", "http://127.1/", "http://127.0.0.1/",
    "http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://0177.0.0.1/", "http://017700000001/",
    "http://10.0.0.1/", "http://192.168.0.1/", "http://metadata.google.internal/", "http://169.254.169.254.nip.io/",
    f"http://user@{HOST}/", f"http://user:pw@{HOST}/", f"http://{HOST}@127.0.0.1/", f"http://{HOST}:80@127.0.0.1/",
    f"http://127.0.0.1\\@{HOST}/", f"http://{HOST}\\@127.0.0.1/", f"http:\\\\{HOST}/", f"http://{HOST}\\.evil/",
    f"http://{HOST}#@127.0.0.1/ a", f"http://{HOST}:22/", f"http://{HOST}:8080/", f"https://{HOST}:80/", f"http://{HOST}:443/",
    f"http://{HOST}:0/", f"http://{HOST}:99999/", f"http://{HOST}.evil.example/", f"http://evil{HOST}/", f"http://.{HOST}/",
    f"http://{HOST}./", f"http://{HOST}%2f@127.0.0.1/", "http://%70ictures.example/", "http://pictures。example/",
    "http://ⓟictures.example/", "http://xn--pctures-xn.example/", f"http://{HOST}\t/", f"http://{HOST}\n/", f" http://{HOST}/",
    f"http://{HOST}/\r\nX: y", f"http://{HOST} /", f"//{HOST}/", f"http:/{HOST}/", f"http:{HOST}/", f"///{HOST}",
    "file:///etc/passwd", f"file://{HOST}/etc/passwd", "gopher://127.0.0.1:6379/_INFO", "ftp://127.0.0.1/", "dict://127.0.0.1/",
    "jar:http://127.0.0.1!/", "data:text/html,x", "javascript:1", "unix:///var/run/docker.sock", f"http+unix://{HOST}/",
    f"http://{HOST}/{'a' * 3000}", "http://", "http:///", "", "\x00", f"http://{HOST}\x00.evil/",
]  # fmt: skip

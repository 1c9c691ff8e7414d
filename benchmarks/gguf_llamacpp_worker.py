"""llama.cpp's side of gguf_vs_llamacpp.py: `JOB RESULT`, both JSON files, where xllamacpp is."""

from __future__ import annotations

import json
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xllamacpp


def served(folder: Path) -> Any:
    """llama.cpp's own server over both files, in float32 throughout."""
    chosen = xllamacpp.CommonParams()
    chosen.model.path, chosen.mmproj.path = str(folder / "model.gguf"), str(folder / "mmproj.gguf")
    chosen.n_ctx, chosen.n_gpu_layers, chosen.warmup, chosen.verbosity = 1024, 0, False, 1
    chosen.cpuparams.n_threads = 1
    chosen.cache_type_k = chosen.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    chosen.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(chosen)


def asked(address: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data, {"content-type": "application/json"})) as reply:
        return json.load(reply)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    server = served(Path(job["folder"]))
    address = server.listening_address
    marker = asked(f"{address}/props")["media_marker"]
    common = {"n_predict": job["words"], "temperature": 0, "n_probs": job["likeliest"], "return_tokens": True}
    answers = []
    for text, picture in zip(job["texts"], job["pictures"], strict=True):
        before, after = text.split(job["marker"])
        around = [{"content": each, "parse_special": True} for each in (before, after)]
        ids = [asked(f"{address}/tokenize", each)["tokens"] for each in around]
        prompt = {"prompt_string": before + marker + after, "multimodal_data": [picture]}
        said = asked(f"{address}/completion", {"prompt": prompt, "cache_prompt": False, **common})
        told = said.get("completion_probabilities") or [{"id": None}]  # none where the answer ends at once
        first = told[0]["top_logprobs"] if told[0]["id"] == said["tokens"][0] else []  # half a character is left out
        answers.append(
            {
                "ids": sum(ids, []),
                "tokens": said["tokens"],
                "first": {each["id"]: each["logprob"] for each in first},
                "text": said["content"],
            }
        )
    found = {"answers": answers, "build": f"xllamacpp {version('xllamacpp')}"}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

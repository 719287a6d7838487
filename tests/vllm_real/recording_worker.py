"""A worker that writes down what passes between our engine and vLLM; run by vLLM's own Python."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src" / "foreword" / "__init__.py"


def main(fd: int) -> None:
    spec = importlib.util.spec_from_file_location("foreword", SOURCE)
    assert spec and spec.loader
    sys.modules["foreword"] = importlib.util.module_from_spec(spec)
    from foreword.serving import worker
    from foreword.serving.engines import vllm as ours

    record: dict[str, Any] = {"arguments": {}, "model": {}, "exchanges": []}
    listen(record)

    class Kept(ours.VllmEngine):
        async def stats(self) -> Any:
            model = self._llm.model_config
            record["model"] = {
                "vocab_size": model.get_vocab_size(), "hidden_size": model.get_hidden_size(),
                "max_model_len": model.max_model_len, "max_logprobs": model.max_logprobs, "dtype": str(model.dtype),
            }  # fmt: skip
            Path(os.environ["RECORD"]).write_text(json.dumps(record))
            return await super().stats()

    worker.host(lambda config: Kept(ours.VllmConfig(**config)), fd)


def listen(record: dict[str, Any]) -> None:
    """Puts ears on the three of vLLM's names that the engine uses."""
    import vllm
    from vllm.engine import arg_utils
    from vllm.v1.engine import async_llm

    sampling, arguments, generate = vllm.SamplingParams, arg_utils.AsyncEngineArgs, async_llm.AsyncLLM.generate
    given: list[tuple[Any, dict[str, Any]]] = []

    def parameters(**how: Any) -> Any:
        made = sampling(**how)
        given.append((made, {**how, "output_kind": how["output_kind"].name}))
        return made

    def engine_arguments(**how: Any) -> Any:
        record["arguments"] = {k: v for k, v in how.items() if k != "seed"}
        return arguments(**how)

    async def heard(self: Any, prompt: Any, how: Any, request_id: str) -> Any:
        exchange = {"prompt": pack_prompt(prompt), "parameters": next(g for m, g in given if m is how), "outputs": []}
        record["exchanges"].append(exchange)
        try:
            async for output in generate(self, prompt, how, request_id):
                exchange["outputs"].append(pack_output(output))
                yield output
        except vllm.exceptions.VLLMClientError as e:
            exchange["refused"] = str(e)
            raise

    vllm.SamplingParams, arg_utils.AsyncEngineArgs = parameters, engine_arguments
    async_llm.AsyncLLM.generate = heard


def pack_prompt(prompt: Any) -> dict[str, Any]:
    import base64

    packed = dict(prompt)
    if "prompt_embeds" in packed:
        rows = packed["prompt_embeds"].half().numpy()
        packed["prompt_embeds"] = {"shape": list(rows.shape), "float16": base64.b64encode(rows.tobytes()).decode()}
    return packed


def pack_output(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    logprobs = completion.logprobs and [{i: p.logprob for i, p in at.items()} for at in completion.logprobs]
    return {
        "token_ids": list(completion.token_ids), "logprobs": logprobs, "finish_reason": completion.finish_reason,
        "num_cached_tokens": output.num_cached_tokens,
    }  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[-1]))

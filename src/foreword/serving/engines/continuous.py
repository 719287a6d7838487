"""transformers' continuous batching, with our ids, our choice of tokens and our attention in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

from foreword.backbone.load import Backbone
from foreword.errors import ForewordError
from foreword.serving.engines.attention import PagedAttention, Replace
from foreword.serving.engines.choosing import Chooser, Deliver, Writer


class Continuous:
    """Runs requests in one batch that they join and leave at every step.

    Args:
        backbone: the model; its embedding answers the requests' ids.
        chooser: chooses each request's token.
        writers: the running requests by id.
        deliver: told of every step.
        replace: gives prefixes their keys and values.
        kv_bytes: size of the cache of keys and values.
        page: tokens of one of its blocks.
        batch_tokens: most tokens of a forward pass.
        most: most requests of a forward pass.
    """

    def __init__(
        self, backbone: Backbone, chooser: Chooser, writers: Mapping[str, Writer], deliver: Deliver, replace: Replace,
        *, kv_bytes: int, page: int, batch_tokens: int, most: int,
    ) -> None:  # fmt: skip
        self.model, self.deliver_fresh, self.writers = backbone.model, deliver, writers
        self._plain_attention = self.model.config._attn_implementation
        windows = getattr(backbone.config, "sliding_window", None)
        self._own_attention = self._plain_attention == "sdpa" and windows is None
        self.takes_prefixes = self._own_attention and _has_prefixes(backbone)
        most_used = most * -(-backbone.window // page)  # no more than all requests at their longest
        blocks = max(min(kv_bytes // (bytes_per_token(backbone) * page), most_used), 4)
        self.tokens = blocks * page
        self.manager = self._manager(backbone.end_id, blocks, page, batch_tokens, most)
        if self._own_attention:
            PagedAttention(replace).install(self.model)
        self.manager.logit_processor = chooser
        self.manager.output_router = self
        self.manager.start()

    def _manager(self, end_id: int, blocks: int, page: int, batch_tokens: int, most: int) -> Any:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        batching = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=blocks,
            max_batch_tokens=batch_tokens,
            max_requests_per_batch=min(most, batch_tokens),
            max_blocks_per_request=0,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=end_id)
        return self.model.init_continuous_batching(greedy, batching)

    # --- what the engine asks --------------------------------------------------------------------

    def is_running(self) -> bool:
        """Whether requests can be taken."""
        return self.manager.is_running() and self.manager.background_thread_status.fatal_error is None

    def add(self, writer: Writer) -> None:
        """Takes a request."""
        self.manager.add_request(
            list(writer.ids),
            request_id=writer.id,
            max_new_tokens=writer.decoding.max_tokens,
            streaming=True,
            eos_token_id=list(writer.ends) or [-1],
        )

    def cancel(self, request_id: str) -> None:
        """Ends a request and frees its blocks."""
        self.manager.cancel_request(request_id)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The model is the caller's inside, between two steps, and attention reads plain inputs."""
        with self.manager.pause():
            batching = self.model.config._attn_implementation
            if batching != "paged|eager":  # ours and transformers' SDPA read both
                yield
                return
            self.model.set_attn_implementation(self._plain_attention)
            try:
                yield
            finally:
                self.model.set_attn_implementation(batching)

    def forget_blocks(self) -> None:
        """Clears what is cached of requests that are over."""
        with self.pause():
            self.manager.batch_processor.cache.evict_cached_blocks()

    def stop(self) -> None:
        """Ends the loop and leaves the model as it was."""
        self.manager.stop(block=True, timeout=60, hard_stop=True)
        self.manager.destroy()
        if self._own_attention:
            self.model.set_attn_implementation(self._plain_attention)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._processor.scheduler.active_requests) if self._processor else 0

    @property
    def waiting(self) -> int:
        """Requests not in the batch yet."""
        known = len(self._processor.scheduler.waiting_requests) if self._processor else 0
        return int(self.manager.input_queue.qsize()) + known

    @property
    def kv_usage(self) -> float:
        """Share of the cache in use by requests or kept of earlier ones."""
        return 1.0 - float(self._processor.cache.compute_free_capacity()) if self._processor else 0.0

    @property
    def _processor(self) -> Any:
        return self.manager.batch_processor

    # --- what the loop asks of its router --------------------------------------------------------

    def deliver(self, output: Any) -> None:
        """One output, from the loop's thread."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        """The outputs of a step, from the loop's thread."""
        known = [(self.writers.get(o.request_id), o.is_finished(), o.error) for o in outputs]
        self.deliver_fresh([(writer, over, error) for writer, over, error in known if writer is not None])

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """A request that failed."""
        writer = self.writers.get(state.request_id)
        if writer is not None:
            self.deliver_fresh([(writer, True, str(error))])


def _has_prefixes(backbone: Backbone) -> bool:
    with suppress(ForewordError):
        return backbone.geometry.layers > 0
    return False


def bytes_per_token(backbone: Backbone) -> int:
    """Keys and values of one token, all layers."""
    config = backbone.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * torch.empty(0, dtype=backbone.dtype).element_size())

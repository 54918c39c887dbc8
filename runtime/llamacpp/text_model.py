"""A loaded text model with its KV cache: all that the engine uses of a llama_cpp.Llama.

Knows llama_cpp's record of its tokens (`input_ids`, `n_tokens`), and that others may use the same Llama; no
images, no templates.
"""

from __future__ import annotations

import ctypes
import re
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError, BundleError, InputError
from pocketllava.llamacpp.batch import Logits, decode_features, decode_tokens
from pocketllava.llamacpp.devices import cores
from pocketllava.llamacpp.guard import (
    ShouldStop,
    check_device,
    deferred_interrupts,
    interruptible,
    translated,
)
from pocketllava.llamacpp.library import give_back_memory
from pocketllava.llamacpp.load_log import missing_part
from pocketllava.llamacpp.log import device_failure, keep_file_descriptors, log_lines, unremarked
from pocketllava.llamacpp.pages import huge_pages, released_pages
from pocketllava.llamacpp.part_of_file import loaded_from
from pocketllava.llamacpp.private import check_llama, set_fields
from pocketllava.llamacpp.sampling import Sampler
from pocketllava.llamacpp.token_rows import TokenRows
from pocketllava.llamacpp.vocabulary import Vocabulary
from pocketllava.models.gguf_header import Header
from pocketllava.models.text_contract import MAX_RUN, TextInfo, check_text, is_unbounded

LONG_RUN = re.compile(
    "|".join(f"{kind}{{{MAX_RUN + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"\s", r"(?:[^\w\s]|_)"))
)
State = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]


class Closing(Protocol):
    """What stands on a model."""

    def close(self) -> None:
        """Free it."""


@dataclass(frozen=True)
class Mark:
    """A moment in a Llama's life: its record and how much it had evaluated then."""

    array: Any
    n_tokens: int
    n_evaluated: int


class TextModel:
    """Text in, logits out. Not thread-safe."""

    def __init__(self, llama: Any, end_ids: Iterable[int] = (), header: Header | None = None) -> None:
        """llama: a llama_cpp.Llama, or a weak proxy of one that somebody else owns.

        end_ids: tokens that end an answer, beside the vocabulary's own. header: of its file, if it was read.
        Raises BackendError for a version of llama_cpp that keeps its record in another way.
        """
        from llama_cpp import llama_cpp

        check_llama(llama)
        self._llama = llama
        self._all_logits = len(llama.scores) == len(llama.input_ids)
        if self._all_logits:  # image positions never get a row of their own
            # llama_cpp leaves it uninitialized, and takes log probabilities of all of it
            llama.scores.fill(0)
        self.vocabulary = Vocabulary(llama_cpp.llama_model_get_vocab(llama.model), end_ids)
        self.n_ctx = min(
            int(llama.n_ctx()), len(llama.input_ids)
        )  # llama.cpp rounds up, llama_cpp's record does not
        pre = self.metadata.get("tokenizer.ggml.pre", "")
        self._bounded = self.metadata.get("tokenizer.ggml.model") == "gpt2" and not is_unbounded(pre)
        self.n_embd, self.n_vocab = int(llama.n_embd()), int(llama.n_vocab())
        self._header = header
        self._contexts: weakref.WeakSet[Closing] = weakref.WeakSet()
        self._token_rows: TokenRows | None = None
        # whether its devices have memory for one more context to compute with, without which ggml ends the process
        self.has_room: Callable[[], bool] = lambda: True

    @classmethod
    def load(
        cls,
        path: Path,
        end_ids: Iterable[int] = (),
        *,
        info: TextInfo | None = None,
        header: Header | None = None,
        releases_pages: bool = False,
        **settings: Any,
    ) -> tuple[TextModel, list[str]]:
        """Load a GGUF file; also what llama.cpp logged meanwhile. settings: llama_cpp.Llama's.

        header: the file's, if it was read. info: what check_text gave for it; it is checked here unless given, because
        llama.cpp ends the process on what it does not expect. releases_pages: let go of mapped weights as they are
        copied. Raises BundleError, BackendError.
        """
        header = header or Header.read(path)
        if info is None:
            check_text(header)
        device_failure()  # of a model that is gone
        with (
            translated(f"{path}: loading the text model"),
            log_lines() as lines,
            released_pages(path) if releases_pages else nullcontext(),
            huge_pages(),
            loaded_from(header.part) if header.part else nullcontext(),
            keep_file_descriptors(),
            deferred_interrupts(),
        ):
            return cls(_llama(path, lines, settings), end_ids, header), lines

    @property
    def path(self) -> Path:
        """The GGUF file."""
        return Path(self._llama.model_path)

    @property
    def header(self) -> Header | None:
        """The file's header, if it was read when the model was loaded."""
        return self._header

    @property
    def metadata(self) -> dict[str, str]:
        """The file's keys, as texts."""
        return dict(self._llama.metadata)

    @property
    def model(self) -> Any:
        """The llama_model, for what else is loaded beside it."""
        return self._llama.model

    @property
    def context_params(self) -> Any:
        """A copy of the parameters that the context was made with."""
        from llama_cpp import llama_cpp

        params = llama_cpp.llama_context_default_params()
        ctypes.pointer(params)[0] = self._llama.context_params
        return params

    def another_context(self, params: Any) -> Any:
        """A llama_context of its own on the model's weights; None where its devices or this machine lack memory."""
        from llama_cpp import llama_cpp

        with unremarked():
            context = llama_cpp.llama_init_from_model(self.model, params)
            if context and not self.has_room():
                llama_cpp.llama_free(context)
                return None
        return context

    @property
    def n_batch(self) -> int:
        """Positions that are evaluated at once, at most."""
        return int(self._llama.n_batch)

    @property
    def n_threads(self) -> int:
        """CPU threads of prompt evaluation."""
        return int(self._llama.n_threads_batch or cores())

    @property
    def on_gpu(self) -> bool:
        """Whether layers are on a GPU."""
        return bool(self._llama.model_params.n_gpu_layers)

    @property
    def settings(self) -> tuple[int, ...]:
        """What an evaluated state depends on, beside the file and the library."""
        p = self._llama.context_params
        layers = self._llama.model_params.n_gpu_layers
        return layers, p.n_batch, p.n_ubatch, p.type_k, p.type_v, p.flash_attn_type

    def tokenize(self, text: str) -> list[int]:
        """Text -> ids; special tokens are text like any other, and no BOS is added.

        Raises InputError for a run that would overflow the stack in libllama's regex.
        """
        if self._bounded and (run := LONG_RUN.search(text)):
            raise InputError(
                f"message text: found {len(run[0])} letters, digits, signs or spaces in a row, expected at most"
                f" {MAX_RUN}: this model's file names no pre-tokenizer; break them up, or convert the checkpoint"
            )
        return list(self._llama.tokenize(text.encode(), add_bos=False, special=False))

    @property
    def n_tokens(self) -> int:
        """Positions in the KV cache."""
        return int(self._llama.n_tokens)

    @property
    def token_ids(self) -> list[int]:
        """One id a position of the KV cache."""
        return [int(i) for i in self._llama.input_ids[: self.n_tokens]]

    def mark(self) -> Mark:
        """Remember this moment, for ids_since()."""
        return Mark(self._llama.input_ids, self.n_tokens, self._n_evaluated())

    def ids_since(self, mark: Mark, ids: list[int]) -> list[int] | None:
        """Ids generated since a mark, when the cache held `ids`; None if anybody else used the Llama meanwhile.

        Token ids alone would not show that, since every picture has the same ones: so the cache's length, the
        count of evaluated tokens and the array itself must agree too.
        """
        n, llama = len(ids), self._llama
        n_generated = self.n_tokens - n
        untouched = (
            mark.n_tokens == n
            and llama.input_ids is mark.array  # load_state replaces it
            and self._last_position() == self.n_tokens - 1
            # a count of 0 is reported as 1
            and 0 <= n_generated - (self._n_evaluated() - mark.n_evaluated) <= 1
            and self.token_ids[:n] == ids
        )
        return self.token_ids[n:] if untouched else None

    def record(self, ids: list[int]) -> None:
        """Write down what the KV cache holds, for llama_cpp's own bookkeeping."""
        self._llama.input_ids[: len(ids)] = ids
        self._llama.n_tokens = len(ids)

    @deferred_interrupts()
    def truncate(self, n: int) -> None:
        """Keep the KV cache's first n positions. Raises BackendError."""
        from llama_cpp import llama_cpp

        memory = llama_cpp.llama_get_memory(self._llama.ctx)
        if not n:
            llama_cpp.llama_memory_clear(memory, True)
        elif not llama_cpp.llama_memory_seq_rm(memory, 0, n, -1):
            raise BackendError(f"KV cache: cannot be cut at position {n}")
        self._llama._requires_eval = True
        self._llama.n_tokens = min(self.n_tokens, n)

    def decode_tokens(self, ids: list[int]) -> None:
        """Evaluate ids after what the KV cache holds."""
        self._llama.eval(ids)

    def decode_features(self, features: npt.NDArray[np.float32], token_id: int) -> None:
        """Evaluate (n, n_embd) rows in the place of tokens; token_id stands for them in the record."""
        self._decode_rows(features, [token_id] * len(features), "none")

    def decode_mixed(self, parts: Sequence[list[int] | Features], token_id: int) -> None:
        """Evaluate ids and (n, n_embd) rows together: every batch reads all weights, however few its positions.

        Logits follow ids, no rows. token_id stands for rows in the record.
        """
        rows = [self.rows(part) if isinstance(part, list) else part for part in parts]
        if any(part is None for part in rows):
            for part in parts:
                if isinstance(part, list):
                    self.decode_tokens(part)
                else:
                    self.decode_features(part, token_id)
            return
        ids = [i for p in parts for i in (p if isinstance(p, list) else [token_id] * len(p))]
        samples = isinstance(parts[-1], list)
        self._decode_rows(
            np.concatenate([part for part in rows if part is not None]), ids, "last" if samples else "none"
        )
        self._llama._requires_eval = not samples

    def _decode_rows(self, rows: Features, ids: list[int], logits: Logits) -> None:
        first = self.n_tokens
        decode_features(self._llama.ctx, rows, first, self.n_batch, logits=logits)
        self._llama.input_ids[first : first + len(ids)] = ids
        self._llama.n_tokens = first + len(ids)

    def rows(self, ids: list[int]) -> Features | None:
        """What libllama looks up for ids, (n, n_embd) float32; None where it has to do that itself.

        That is a Llama that keeps the logits of all tokens, which are its own to record, and a file that has gone.
        """
        if self._all_logits:
            return None
        try:
            self._token_rows = self._token_rows or TokenRows(self.path, self._header)
        except (OSError, BundleError, KeyError):
            return None
        return self._token_rows.read(ids)

    def interruptible(self, should_stop: ShouldStop | None) -> AbstractContextManager[None]:
        """End evaluation inside the block once should_stop() is true: raises Interrupted."""
        return interruptible(self._llama.ctx, should_stop)

    def state_bytes(self) -> int:
        """Bytes of state()."""
        from llama_cpp import llama_cpp

        return int(llama_cpp.llama_state_seq_get_size(self._llama.ctx, 0))

    @deferred_interrupts()
    def state(self) -> State:
        """What the KV cache holds, as bytes: (n_bytes,) uint8. Raises EngineDied rather than give what is not so."""
        from llama_cpp import llama_cpp

        state = np.empty(self.state_bytes(), np.uint8)
        written = llama_cpp.llama_state_seq_get_data(self._llama.ctx, _pointer(state), len(state), 0)
        check_device()
        return state[:written]

    @deferred_interrupts()
    def restore(self, state: State, n_positions: int) -> bool:
        """Replace what the KV cache holds; False if llama.cpp refused it, and then its content is undefined."""
        from llama_cpp import llama_cpp

        self.truncate(0)
        memory = llama_cpp.llama_get_memory(self._llama.ctx)
        return bool(
            llama_cpp.llama_state_seq_set_data(self._llama.ctx, _pointer(state), len(state), 0) == len(state)
            and llama_cpp.llama_memory_seq_pos_min(memory, 0) == 0
            and self._last_position() == n_positions - 1
        )

    def generate(self, prompt: list[int], *, seed: int, **sampling: Any) -> Generator[int, None, None]:
        """Sample tokens after a prompt that the KV cache holds. sampling: llama_cpp.Llama.generate's settings.

        Close it: a Ctrl-C that comes while the garbage collector does would be lost.
        """
        self._llama.set_seed(seed)
        with closing(self._llama.generate(prompt, **sampling)) as tokens:
            while True:
                with deferred_interrupts():
                    token = next(tokens, None)
                check_device()
                if token is None:
                    return
                yield token

    def sampler(self, *, seed: int, **sampling: Any) -> Sampler:
        """What generate() samples with, for logits of the caller's own choice."""
        self._llama.set_seed(seed)
        return Sampler(self._llama._init_sampler(**sampling))

    def logits_after(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits after each of these tokens, (n, n_vocab) float32. They are evaluated, but not written down: truncate.

        Raises BackendError.
        """
        from llama_cpp import llama_cpp

        rows = np.empty((len(ids), self.n_vocab), np.float32)
        for start in range(0, len(ids), self.n_batch):
            part = ids[start : start + self.n_batch]
            decode_tokens(self._llama.ctx, part, self.n_tokens + start, self.n_batch, logits="all")
            pointer = llama_cpp.llama_get_logits(self._llama.ctx)
            rows[start : start + len(part)] = np.ctypeslib.as_array(pointer, (len(part), self.n_vocab))
        check_device()
        return rows

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits of the next token, (n_vocab,) float32."""
        from llama_cpp import llama_cpp

        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        check_device()
        return np.ctypeslib.as_array(pointer, (self.n_vocab,)).copy()

    def restore_logits(self, logits: npt.NDArray[np.float32]) -> None:
        """Sample the next token from logits that an earlier evaluation of the same positions gave, (n_vocab,)."""
        from llama_cpp import llama_cpp

        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        np.ctypeslib.as_array(pointer, (self.n_vocab,))[:] = logits
        self._llama._requires_eval = False

    def close(self) -> None:
        """Free the model, and first the contexts that stand on it."""
        for context in list(self._contexts):
            context.close()
        self._llama.close()
        give_back_memory()

    def adopt(self, context: Closing) -> None:
        """A context on this model, to be closed before it."""
        self._contexts.add(context)

    def _last_position(self) -> int:
        from llama_cpp import llama_cpp

        return int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self._llama.ctx), 0))

    def _n_evaluated(self) -> int:
        """Tokens and embeddings that the context has evaluated since its timings were reset."""
        from llama_cpp import llama_cpp

        llama_cpp.llama_synchronize(self._llama.ctx)
        perf = llama_cpp.llama_perf_context(self._llama.ctx)
        return int(perf.n_p_eval + perf.n_eval)


def _llama(path: Path, lines: list[str], settings: dict[str, Any]) -> Any:
    """A Llama. Raises BackendError that names the part which found no memory, if that is why there is none."""
    from llama_cpp import Llama

    try:
        return Llama(str(path), verbose=False, **settings)
    except Exception as error:
        if part := missing_part(lines):
            raise BackendError(f"{path}: loading the text model: no memory for its {part}") from error
        raise


def load_model(path: Path) -> Any:
    """A llama_model on the CPU without a context, for as long as the process lives. Raises BackendError."""
    from llama_cpp import llama_cpp

    params = llama_cpp.llama_model_default_params()
    # not mapped: Windows could not remove the file before this process ends
    set_fields(params, n_gpu_layers=0, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise BackendError(f"{path}: llama.cpp could not load it")
    return model


def _pointer(state: State) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))

"""Bundle -> a loaded Session, as it was planned for this machine.

Knows llama_cpp.Llama's settings; what a model takes and whether it fits is planned in models/plan.py. Nothing of
prompts or answers.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pocketllava.engine.placing import (
    device_shortage,
    has_room_to_work,
    require_named,
    tested,
    text_kind,
    vision_device,
)
from pocketllava.engine.session import Session
from pocketllava.errors import BackendError, OutOfMemory, UnsupportedOption
from pocketllava.llamacpp.devices import gpus, machine
from pocketllava.llamacpp.load_log import text_device
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.models import Bundle
from pocketllava.models.memory import batch_size
from pocketllava.models.plan import Plan, is_exact, plan
from pocketllava.models.plan_text import shortage
from pocketllava.types import LoadOptions

logger = logging.getLogger(__name__)
T = TypeVar("T")
# enum llama_split_mode NONE, and no device: else weights lie in a GPU's pinned memory, and long batches run on it
CPU_ALONE = {"split_mode": 0, "main_gpu": -1}

Q8_0 = 8  # enum ggml_type


@dataclass(frozen=True)
class Loaded:
    """A session, and what evaluates its text model, such as "CPU, 2 threads, weights in memory"."""

    session: Session
    device: str


def planned(bundle: Bundle, options: LoadOptions) -> Plan:
    """How the bundle will be loaded on this machine.

    Raises UnsupportedOption for what this build cannot do, BundleError.
    """
    _ = bundle.text_info, bundle.mmproj_info  # both are checked before anything is loaded
    here = machine(options.n_threads)
    if options.n_gpu_layers > 0 and not here.devices:
        raise UnsupportedOption(
            f"n_gpu_layers: found {options.n_gpu_layers}, but this llama-cpp-python was built for CPUs only;"
            " install a Metal or CUDA build (docs/devices.md) or leave it out"
        )
    return plan(bundle, options, tested(bundle, options, here))


def load_bundle(bundle: Bundle, options: LoadOptions) -> Loaded:
    """Raises UnsupportedOption for what this build cannot do, BundleError, OutOfMemory, BackendError."""
    first = planned(bundle, options)
    require_named(first, options)
    asked = options.n_gpu_layers if first.n_gpu_layers or first.vision_device else 0

    def load(layers: int) -> Loaded:
        without = replace(options, n_gpu_layers=0, main_gpu=None, tensor_split=None)
        fitted = first if layers == asked else planned(bundle, without)
        _check(fitted)
        return _load(bundle, fitted, options)

    if reason := device_shortage(first, options, exact=is_exact(bundle, options)):
        logger.warning("%s", reason)
    return or_on_cpu(load, asked, bundle, [device.name for device in first.machine.devices])


def _load(bundle: Bundle, fitted: Plan, options: LoadOptions) -> Loaded:
    text, device = _load_text(bundle, fitted, options)
    try:
        text.has_room = lambda: has_room_to_work(fitted, options)
        vision = vision_device(fitted, options)
        exact = is_exact(bundle, options)
        with _explained(fitted):
            kind = text_kind(fitted, options)
            said = replace(options, kept_bytes=fitted.kept)
            session = Session(
                text, bundle.mmproj, bundle, said, vision_device=vision, exact=exact, text_kind=kind
            )
            return Loaded(session, device)
    except BaseException:
        with contextlib.suppress(Exception):
            text.close()
        raise


def or_on_cpu(load: Callable[[int], T], layers: int, bundle: Bundle, devices: list[str]) -> T:
    """What load(layers) gives; load(0) where all layers were to be on the GPU (-1) and that failed."""
    try:
        return load(layers)
    except BackendError as error:
        if layers != -1:
            raise
        logger.warning("%s does not load on %s: using the CPU (%s)", bundle.model, devices[0], error)
    gc.collect()  # what was loaded until then: a Llama holds itself by a cycle
    return load(0)


def _check(fitted: Plan) -> None:
    """Say what was chosen and what is short. Raises OutOfMemory where llama.cpp would end the process."""
    if fitted.refused:
        raise out_of_memory(fitted)
    if fitted.chosen:
        differs = "; close answers may differ" if any("q8_0" in chosen for chosen in fitted.chosen) else ""
        logger.warning(
            "%s: does not fit the memory as usual, takes %s%s",
            fitted.model,
            " and ".join(fitted.chosen),
            differs,
        )
    if fitted.verdict != "fits":
        logger.warning("%s: %s", fitted.verdict, shortage(fitted))


@contextlib.contextmanager
def _explained(fitted: Plan) -> Iterator[None]:
    """OutOfMemory for what llama.cpp could not do where the plan is tight: it names no reason itself."""
    try:
        yield
    except BackendError as error:
        if fitted.is_tight:
            raise out_of_memory(fitted) from error
        raise


def out_of_memory(fitted: Plan) -> OutOfMemory:
    """The error that says what is missing, and carries the plan."""
    room = fitted.decisive
    return OutOfMemory(shortage(fitted), room.needed, max(0, room.left), str(fitted))


def _load_text(bundle: Bundle, fitted: Plan, options: LoadOptions) -> tuple[TextModel, str]:
    """The text model, and where it is. Raises BundleError, OutOfMemory, BackendError."""
    if options.n_ctx is not None and fitted.n_ctx != options.n_ctx:
        logger.warning(
            "n_ctx: %d became %d, the next length that llama.cpp allocates", options.n_ctx, fitted.n_ctx
        )
    threads = fitted.machine.n_threads
    settings: dict[str, Any] = {
        "n_ctx": fitted.n_ctx,
        "n_batch": batch_size(bundle),
        "n_ubatch": batch_size(bundle),
        "n_threads": threads,
        "n_threads_batch": threads,
        "use_mmap": not fitted.in_memory,
        "flash_attn": fitted.flash_attention,
        "n_gpu_layers": -1 if fitted.n_gpu_layers == fitted.n_layers else fitted.n_gpu_layers,
    }
    if not fitted.n_gpu_layers:
        settings |= CPU_ALONE
    elif options.main_gpu is not None:
        settings |= {"split_mode": 0, "main_gpu": options.main_gpu}
    elif options.tensor_split is not None:
        settings["tensor_split"] = list(options.tensor_split)
    if fitted.kv_type == "q8_0":
        settings |= {"type_k": Q8_0, "type_v": Q8_0}
    with _explained(fitted):
        # config.json may name several ends; a GGUF file holds one
        text, lines = TextModel.load(
            bundle.model,
            bundle.manifest.eos_token_ids,
            info=bundle.text_info,
            header=bundle.model_header,
            releases_pages=fitted.releases_pages,
            **settings,
        )
    weights = f"weights {'in memory' if fitted.in_memory else 'mapped'}"
    return text, ", ".join([text_device(lines, gpus(), threads), weights, *fitted.chosen])

"""Whether an adapter and a backbone belong together."""

from __future__ import annotations

import logging

from foreword.artifact.folder import Adapter
from foreword.backbone.fingerprint import Fingerprint
from foreword.backbone.load import Backbone
from foreword.errors import ForewordError

log = logging.getLogger("foreword")


def refuse_several_tasks(adapter: Adapter) -> None:
    """Refuses an adapter of several tasks where one of them is meant."""
    tasks = int(adapter.config.get("num_tasks") or 1)
    if tasks > 1:
        raise ForewordError(
            f"the adapter holds {tasks} tasks, and nothing says which",
            str(adapter.folder),
            "give one of its folders under tasks/, or export one: foreword export --task N",
        )


def rounding_note(adapter: Adapter, quantize: str) -> str:
    """What to say of a backbone that is rounded in another way than the soft prompt was trained with, or nothing.

    Args:
        adapter: of the soft prompt.
        quantize: of the backbone, as in a sidecar.
    """
    trained = str(adapter.sidecar.training.get("quantize", "")) if adapter.sidecar else ""
    if not trained or trained == quantize:
        return ""
    words = ["weights as they are" if q == "none" else f"weights in {q}" for q in (trained, quantize)]
    return f"{adapter.folder.name} was trained on {words[0]} and is read by {words[1]}: its scores may differ"


def check_backbone(adapter: Adapter, backbone: Backbone, force: bool = False) -> None:
    """Refuses a backbone the soft prompt was not trained for, naming both; warns of one that is rounded otherwise."""
    if note := rounding_note(adapter, backbone.rounding):
        log.warning("%s", note)
    named = (adapter.sidecar.backbone if adapter.sidecar else {}).get("name")
    trained = named or adapter.config.get("base_model_name_or_path") or "a model it does not name"
    where = f"adapter {adapter.folder} of {trained}, backbone {backbone.name}"
    width, prompt = adapter.prompt.values.shape[1], adapter.prompt
    own = backbone.hidden_size if prompt.kind == "rows" else backbone.geometry.width
    if width != own:
        raise ForewordError(f"the soft prompt is {width} wide, the backbone {own}", where, f"load {trained}")
    if force:
        return
    layers, actual = adapter.config.get("num_layers"), getattr(backbone.config, "num_hidden_layers", None)
    difference = f"num_layers is {actual}, not {layers}" if layers and actual and layers != actual else ""
    if adapter.sidecar and "fingerprint" in adapter.sidecar.backbone:
        difference = Fingerprint.from_dict(adapter.sidecar.backbone["fingerprint"]).differs(backbone.fingerprint)
    if difference:
        raise ForewordError(
            f"another backbone than the soft prompt was trained for: {difference}",
            where,
            f"load {trained}, or --force to use it all the same",
        )

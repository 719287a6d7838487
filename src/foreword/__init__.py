"""Foreword: train, score, share and serve soft prompts for frozen causal language models.

import foreword

task = foreword.train(model="smollm2-135m", data="train.csv", eval_data="test.csv",
                      text="Tweet text", label="Label", out="runs/complaints")
print(task.scores["accuracy"], task.predict(["My bill is wrong again"]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreword.errors import ForewordError

if TYPE_CHECKING:
    from foreword.api import Ensemble, Foreword, Prediction, load, train, tune

__all__ = ["Ensemble", "Foreword", "ForewordError", "Prediction", "load", "train", "tune"]


def __getattr__(name: str) -> Any:
    """Loads torch and transformers only when something is asked for."""
    if name in __all__:
        from foreword import api

        return getattr(api, name)
    raise AttributeError(f"module 'foreword' has no attribute '{name}'")

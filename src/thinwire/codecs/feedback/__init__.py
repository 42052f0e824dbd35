"""Memories around codecs: error feedback and its relatives, and the table of their names."""

from collections.abc import Callable, Mapping

from thinwire.codecs.feedback.base import Feedback, Place
from thinwire.codecs.feedback.dgc import DGC, dgc
from thinwire.codecs.feedback.diana import Diana, diana
from thinwire.codecs.feedback.econtrol import EControl, econtrol
from thinwire.codecs.feedback.ef21 import EF21, ef21
from thinwire.codecs.feedback.ef21_sgdm import EF21SGDM, ef21_sgdm
from thinwire.codecs.feedback.ef21w import EF21W, ef21w
from thinwire.codecs.feedback.frozen_adam import FrozenAdam, frozen_adam
from thinwire.codecs.feedback.gmf import GMF, gmf
from thinwire.codecs.feedback.residual import ErrorFeedback, feedback
from thinwire.codecs.feedback.scafcom import Scafcom, scafcom
from thinwire.codecs.feedback.scallion import Scallion, scallion

#: Every scheme by the name it has in expressions.
FEEDBACK: Mapping[str, Callable[..., Feedback]] = {
    "feedback": ErrorFeedback,
    "ef21": EF21,
    "ef21w": EF21W,
    "ef21_sgdm": EF21SGDM,
    "econtrol": EControl,
    "diana": Diana,
    "dgc": DGC,
    "gmf": GMF,
    "scallion": Scallion,
    "scafcom": Scafcom,
    "frozen_adam": FrozenAdam,
}

__all__ = [
    "DGC",
    "EF21",
    "EF21SGDM",
    "EF21W",
    "FEEDBACK",
    "GMF",
    "Diana",
    "EControl",
    "ErrorFeedback",
    "Feedback",
    "FrozenAdam",
    "Place",
    "Scafcom",
    "Scallion",
    "dgc",
    "diana",
    "econtrol",
    "ef21",
    "ef21_sgdm",
    "ef21w",
    "feedback",
    "frozen_adam",
    "gmf",
    "scafcom",
    "scallion",
]  # fmt: skip

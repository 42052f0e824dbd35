"""Memories around codecs: error feedback and its relatives, and the table of their names."""

from collections.abc import Callable, Mapping

from thinwire.codecs.feedback.base import Feedback, Place
from thinwire.codecs.feedback.dgc import DGC, dgc
from thinwire.codecs.feedback.frozen_adam import FrozenAdam, frozen_adam
from thinwire.codecs.feedback.gmf import GMF, gmf
from thinwire.codecs.feedback.residual import ErrorFeedback, feedback
from thinwire.codecs.feedback.scafcom import Scafcom, scafcom
from thinwire.codecs.feedback.scallion import Scallion, scallion

#: Every scheme by the name it has in expressions.
FEEDBACK: Mapping[str, Callable[..., Feedback]] = {
    "feedback": ErrorFeedback,
    "dgc": DGC,
    "gmf": GMF,
    "scallion": Scallion,
    "scafcom": Scafcom,
    "frozen_adam": FrozenAdam,
}

__all__ = [
    "DGC", "FEEDBACK", "GMF", "ErrorFeedback", "Feedback", "FrozenAdam", "Place", "Scafcom", "Scallion", "dgc",
    "feedback", "frozen_adam", "gmf", "scafcom", "scallion",
]  # fmt: skip

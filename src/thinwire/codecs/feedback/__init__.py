"""Memories around codecs: error feedback and its relatives, and the table of their names."""

from collections.abc import Callable, Mapping

from thinwire.codecs.feedback.base import Feedback, Place
from thinwire.codecs.feedback.residual import ErrorFeedback, feedback

#: Every scheme by the name it has in expressions.
FEEDBACK: Mapping[str, Callable[..., Feedback]] = {
    "feedback": ErrorFeedback,
}

__all__ = ["FEEDBACK", "ErrorFeedback", "Feedback", "Place", "feedback"]

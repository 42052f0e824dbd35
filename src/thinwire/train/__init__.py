"""What is trained: models, data and losses, as tasks. Nothing in here knows of links or methods."""

from __future__ import annotations

from collections.abc import Mapping

from thinwire.train.huggingface import HuggingFaceOptions
from thinwire.train.images import ImageOptions
from thinwire.train.tasks import Batch, Task, TaskOptions
from thinwire.train.text import TextOptions

#: The tasks that come with thinwire, by their name in a configuration. Any other is a user's `module:function`.
TASKS: Mapping[str, type[TaskOptions]] = {
    "text": TextOptions,
    "images": ImageOptions,
    "huggingface": HuggingFaceOptions,
}

__all__ = ["TASKS", "Batch", "Task", "TaskOptions"]

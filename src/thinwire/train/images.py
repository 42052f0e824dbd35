"""Image classification with a small convolutional network; with batch norm, a model that has buffers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.errors import ConfigError
from thinwire.options import about, check
from thinwire.train.sampling import epoch_positions, held_out
from thinwire.train.tasks import Batch, evaluating, import_extra

#: 1797 handwritten digits of 8 x 8 pixels that come with scikit-learn.
DIGITS = "digits"

_VALIDATION_SHARE = 0.2
_GROUPS = 4  # of group norm; divides every width below


@dataclass(frozen=True)
class ImageOptions:
    """A small convolutional network that learns to name what is on a picture."""

    data: str = field(
        default=DIGITS,
        metadata=about(
            "`digits` (scikit-learn's, extra `images`), a folder with one subfolder of pictures for each class, or a "
            ".npz file with `x` [n, height, width] or [n, height, width, channels] and `y` [n]"
        ),
    )
    pixels: int = field(default=32, metadata=about("edge to which the pictures of a folder are resized", at_least=8))
    width: int = field(default=16, metadata=about("channels of the first layer, a multiple of 4", at_least=4))
    norm: Literal["batch", "group"] = field(
        default="batch", metadata=about("`batch` keeps running means and variances in buffers, `group` has none")
    )
    batch_size: int = field(default=32, metadata=about("pictures for each local step of a member", at_least=2))

    def __post_init__(self) -> None:
        check(self)
        if self.width % _GROUPS:
            raise ConfigError(
                f"ImageOptions: width = {self.width}",
                expected=f"a multiple of {_GROUPS}",
                mend=f"set width to {_GROUPS * round(self.width / _GROUPS)}",
            )

    def build(self, *, seed: int) -> ImageTask:
        """Read the pictures; a fifth of them, the same for every seed, is held out."""
        x, y = _load(self)
        train, valid = held_out(len(x), _VALIDATION_SHARE)
        mean, std = x[train].mean(dim=(0, 2, 3), keepdim=True), x[train].std(dim=(0, 2, 3), keepdim=True)
        x = (x - mean) / std.clamp(min=1e-6)  # a channel that is constant stays so
        return ImageTask(self, seed, x, y, train, valid)


@dataclass(frozen=True, eq=False)
class ImageTask:
    """Every member its own part of each epoch; see `thinwire.train.tasks.Task`.

    x             [n, channels, height, width], mean 0 and variance 1 over the training part
    y             int64 [n], from 0
    train, valid  int64: which of the n are for what
    """

    options: ImageOptions
    seed: int
    x: Tensor
    y: Tensor
    train: Tensor
    valid: Tensor

    def model(self) -> nn.Module:
        """A fresh network."""
        classes = int(self.y.max()) + 1
        return small_cnn(self.x.shape[1], classes, width=self.options.width, norm=self.options.norm)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """The member's next pictures; together the members see each one once an epoch."""
        size, n = self.options.batch_size, len(self.train)
        return self._batch(self.train[epoch_positions(self.seed, step, rank, world, batch_size=size, n=n)])

    @property
    def units_per_epoch(self) -> int:
        """Batches of one member alone in which each picture was seen."""
        return -(-len(self.train) // self.options.batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy in nats."""
        return F.cross_entropy(model(batch.inputs).float(), batch.targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and share of right answers on the held-out pictures."""
        total, right = 0.0, 0
        with evaluating(model) as device:
            for index in torch.split(self.valid, 256):
                batch = self._batch(index).to(device)
                logits = model(batch.inputs).float()  # [b, classes]
                total += float(F.cross_entropy(logits, batch.targets, reduction="sum"))
                right += int((logits.argmax(dim=1) == batch.targets).sum())
        return {"loss": total / len(self.valid), "accuracy": right / len(self.valid)}

    def _batch(self, index: Tensor) -> Batch:
        return Batch(self.x[index], self.y[index], samples=len(index), tokens=0)


def small_cnn(channels: int, classes: int, *, width: int, norm: Literal["batch", "group"]) -> nn.Module:
    """[b, channels, height, width] -> logits [b, classes]; pictures of any size from 4 x 4."""
    return nn.Sequential(
        *_stage(channels, width, norm, stride=1),
        *_stage(width, 2 * width, norm, stride=2),
        *_stage(2 * width, 4 * width, norm, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def _stage(read: int, write: int, norm: Literal["batch", "group"], *, stride: int) -> tuple[nn.Module, ...]:
    normalise = nn.BatchNorm2d(write) if norm == "batch" else nn.GroupNorm(_GROUPS, write)
    return nn.Conv2d(read, write, 3, stride=stride, padding=1, bias=False), normalise, nn.ReLU()


def _load(options: ImageOptions) -> tuple[Tensor, Tensor]:
    """Pictures and classes: [n, channels, height, width], int64 [n]."""
    path = Path(options.data)
    if options.data == DIGITS:
        digits = import_extra("sklearn.datasets", extra="images", purpose="data = 'digits'").load_digits()
        x, y = digits.images, digits.target
    elif path.is_dir():
        x, y = _folder(path, options.pixels)
    else:
        x, y = _npz(path)
    return _checked(np.asarray(x), np.asarray(y), options.data)


def _folder(folder: Path, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """RGB pictures, classes in the order of the subfolders' names."""
    from PIL import Image, UnidentifiedImageError

    pictures, classes = [], []
    names = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    for number, name in enumerate(names):
        for file in sorted((folder / name).iterdir()):
            try:
                with Image.open(file) as image:
                    pictures.append(np.asarray(image.convert("RGB").resize((pixels, pixels))))
            except (UnidentifiedImageError, OSError) as error:
                raise ConfigError(
                    f"{file}: no picture: {error}",
                    expected="only pictures in the classes' folders",
                    mend="move it away",
                ) from error
            classes.append(number)
    if not pictures:
        raise ConfigError(
            f"{folder}: there is no picture in its subfolders",
            expected="one subfolder of pictures for each class",
            mend="make a folder for each class and move the pictures into them",
        )
    return np.stack(pictures), np.array(classes)


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path}: {error.strerror if isinstance(error, OSError) and error.strerror else error}",
            expected="'digits', a folder with one subfolder for each class, or a .npz file with x and y",
            mend="check the path; write the file with numpy.savez(path, x=pictures, y=classes)",
        ) from error


def _checked(x: np.ndarray, y: np.ndarray, data: str) -> tuple[Tensor, Tensor]:
    """Channels first, float32; classes as numbers from 0."""
    right = x.ndim in (3, 4) and y.shape == x.shape[:1] and x.dtype.kind in "uif" and y.dtype.kind in "ui"
    if not right or len(x) < 2 or int(y.min()) < 0:
        raise ConfigError(
            f"{data}: x is {x.dtype} {list(x.shape)} and y is {y.dtype} {list(y.shape)}",
            expected="at least 2 pictures: x numbers [n, height, width] or [n, height, width, channels], y classes "
            "[n] counted from 0",
            mend="change the arrays' shapes or types before they are saved",
        )
    pictures = torch.from_numpy(x.astype(np.float32))
    pictures = pictures[:, None] if x.ndim == 3 else pictures.permute(0, 3, 1, 2)
    return pictures.contiguous(), torch.from_numpy(y.astype(np.int64))

"""Accelerate's LocalSGD around the plain loop.

options  every: local steps between averages of the models
"""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from member import Member


def main() -> None:
    work = Member(Path(sys.argv[1]))
    accelerator = Accelerator(cpu=True)
    plain = work.model()
    model, optimizer = accelerator.prepare(plain, work.optimizer(plain.parameters()))
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=work.options["every"]) as local_sgd:
        work.begin(work.last_equal(plain, work.options["every"]))
        for _ in work.steps():
            accelerator.backward(work.loss(model))
            accelerator.clip_grad_norm_(model.parameters(), work.work["clip_norm"])
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()
            work.stepped()


if __name__ == "__main__":
    main()

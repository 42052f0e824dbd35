"""thinwire in other people's frameworks: the Hugging Face Trainer, Accelerate, Lightning.

Every member runs the framework as a program of one process; between members there is thinwire alone. Each part is a
module of its own, imported by those who have the framework:

    thinwire.integrations.huggingface   synchronize(trainer, method, link)
    thinwire.integrations.accelerate    synchronize(accelerator, model, optimizer, method, link)
    thinwire.integrations.lightning     Synchronized(method, link), a callback

Fabric needs none of them: thinwire.synchronize goes around its loop (docs/frameworks.md).
"""

from thinwire.integrations.apart import join

__all__ = ["join"]

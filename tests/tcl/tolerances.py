"""How far the torch side may be from the authors' numbers, beside how far it was when last measured.

Measured on x86-64 with torch 2.15, fp32, one thread. `-v` prints what a run measures. The error is the largest
|ours - theirs|; a relative one is divided by the largest |theirs| of the tensor (sums over a gradient: by its norm).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    limit: float
    measured: float
    relative: bool = False


TOLERANCES = {
    "masks": Tolerance(1e-5, 4.1e-6),
    "similarity map": Tolerance(2e-6, 3.0e-7),
    "KP similarity map": Tolerance(2e-6, 1.8e-7),
    "position embedding": Tolerance(1e-6, 0.0),
    "global image embedding": Tolerance(1e-5, 1.2e-6),
    "text embedding, raw": Tolerance(1e-5, 1.6e-6),
    "text embedding, ensemble": Tolerance(1e-6, 1.3e-7),
    "CLIP image embedding": Tolerance(1e-5, 4.8e-7),
    "CLIP text embedding": Tolerance(1e-5, 1.0e-6),
    "PAMR": Tolerance(1e-5, 1.9e-6),
    "PAMR weights": Tolerance(1e-6, 0.0),
    "PAMR standard deviation": Tolerance(1e-6, 0.0),
    "losses": Tolerance(1e-5, 8.8e-7, relative=True),
    "training intermediates": Tolerance(1e-5, 2.4e-6),
    "gradients": Tolerance(1e-4, 1.5e-6, relative=True),
    "gradient norm": Tolerance(1e-4, 6.2e-7, relative=True),
    "gradient sums": Tolerance(1e-4, 1.3e-6, relative=True),
    "parameters after steps": Tolerance(1e-5, 4.4e-8, relative=True),
    "parameter sums after steps": Tolerance(1e-5, 6.5e-7, relative=True),
    "learning rate": Tolerance(1e-9, 4.1e-13, relative=True),
    "self-only attention": Tolerance(1e-5, 0.0),
}

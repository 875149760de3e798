"""Draw the sample scenes of `tclkit demo` into runtime/samples: python .dev/make_samples.py

They come from a world seed that neither training nor evaluation uses; the first six scenes with three objects or more
are taken as they come.
"""

import json
from pathlib import Path

from PIL import Image

from tclkit.tcl.world import OBJECT_NAMES, WorldConfig, scenes

FOLDER = Path(__file__).parents[1] / "runtime" / "samples"
WORLD = WorldConfig(size=384, seed=20_261)
COUNT = 6


def main() -> None:
    """Write scene-N.png and samples.json."""
    listed = []
    for drawn in scenes(WORLD):
        if len(drawn.present) < 3:
            continue
        file = f"scene-{len(listed) + 1}.png"
        Image.fromarray(drawn.image).quantize(256, dither=Image.Dither.NONE).save(FOLDER / file, optimize=True)
        listed.append({"file": file, "prompts": [OBJECT_NAMES[i] for i in drawn.present]})
        if len(listed) == COUNT:
            break
    (FOLDER / "samples.json").write_text(json.dumps({"scenes": listed}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The embedded model: a small, genuine Stable Diffusion 3 pipeline that draws scenes of coloured shapes.

`scenes.py` holds the prompt grammar and the renderer, `architecture.py` the module configurations,
`pretrain.py` trains everything from scratch, and `weights/` is the pipeline directory it wrote.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The pipeline directory; `WEIGHTS / "preview_decoder"` holds the AutoencoderTiny."""

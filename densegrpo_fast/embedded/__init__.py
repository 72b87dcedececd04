"""The embedded models: small, genuine Stable Diffusion 3 pipelines that draw scenes of coloured shapes, or signs.

`scenes.py` and `words.py` hold their sentences and renderers, `architecture.py` the module configurations,
`pretrain.py` trains everything, and the directories of `EMBEDDED` are what it wrote.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
EMBEDDED = {"embedded": _HERE / "weights", "embedded_words": _HERE / "words_weights"}
"""The pipeline directories by what `model.path` calls them; their `preview_decoder` holds an AutoencoderTiny."""
WEIGHTS = EMBEDDED["embedded"]
"""That of the first, as model cards name it."""

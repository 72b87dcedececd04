"""The families of models that are known, by the pipeline class that model_index.json names."""

from __future__ import annotations

from densegrpo_fast.models.family import Family
from densegrpo_fast.models.flux import Flux
from densegrpo_fast.models.flux2_klein import Flux2Klein
from densegrpo_fast.models.qwen_image import QwenImage
from densegrpo_fast.models.sd3 import StableDiffusion3
from densegrpo_fast.models.stable_diffusion import StableDiffusion, StableDiffusionXL
from densegrpo_fast.models.supported import unsupported
from densegrpo_fast.models.wan import Wan
from densegrpo_fast.models.z_image import ZImage

FAMILIES: dict[str, type[Family]] = {
    family.pipeline_class: family
    for family in (
        StableDiffusion3,
        Flux,
        StableDiffusion,
        StableDiffusionXL,
        QwenImage,
        ZImage,
        Flux2Klein,
        Wan,
    )
}


def family_of(pipeline_class: str) -> type[Family]:
    """The family of a pipeline class.

    Raises:
        ValueError: there is none.
    """
    if pipeline_class not in FAMILIES:
        raise ValueError(unsupported(pipeline_class))
    return FAMILIES[pipeline_class]

"""The modules of the embedded pipeline, untrained: SD3's own classes with small configurations.

Everything is built from the ordinary diffusers and transformers classes, so the trained directory is loaded by
`StableDiffusion3Pipeline.from_pretrained` like SD3.5's.
"""

from __future__ import annotations

from collections.abc import Iterable

from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

LATENT_CHANNELS = 4
LATENT_SIZE = 16
MAX_TOKENS = 16
"""Tokens per prompt and text encoder; the longest sentence of the grammar has 13 with its start and end marks."""

_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_TEXT_WIDTH = 64


def build_tokenizer(sentences: Iterable[str]) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges make one token of every word in `sentences`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        end_of_word_suffix=_WORD_END,
        show_progress=False,
        initial_alphabet=alphabet,
    )
    learner.train_from_iterator(sorted(set(sentences)), trainer)
    merges = _merges_of(learner)
    pieces = alphabet + [letter + _WORD_END for letter in alphabet]
    pieces += ["".join(merge) for merge in merges]
    vocabulary = {piece: index for index, piece in enumerate([*dict.fromkeys(pieces), _START, _END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text model with projection."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    """A 3.5M-parameter SD3 transformer: 6 joint-attention blocks of width 128 over 64 image tokens."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * _TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
    )


def build_vae() -> AutoencoderKL:
    """A 0.65M-parameter convolutional autoencoder: 64x64 pixels to 16x16 latents of 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=LATENT_SIZE * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_preview_decoder() -> AutoencoderTiny:
    """A 0.03M-parameter decoder for the same latents: the miniature of TAESD."""
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """SD3's scheduler: rectified flow with shift 3."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def build_pipeline(sentences: Iterable[str]) -> StableDiffusion3Pipeline:
    """The whole untrained pipeline; like SD3 without its T5 encoder."""
    tokenizer = build_tokenizer(sentences)
    return StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=build_scheduler(),
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )

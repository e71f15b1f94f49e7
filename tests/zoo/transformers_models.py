"""transformers: from configs with two narrow layers, on short sequences, small images and short sounds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.architecture import Architecture, Inputs, ids, noise

Settings = dict[str, Any]

VOCABULARY = 99
LAYERS: Settings = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT: Settings = {**LAYERS, "vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
GROUPED: Settings = {**TEXT, "num_key_value_heads": 2}
GPT: Settings = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2}
BOTH: Settings = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": VOCABULARY,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5: Settings = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "vocab_size": VOCABULARY, "decoder_start_token_id": 0}
IMAGE: Settings = {**LAYERS, "image_size": 32, "patch_size": 8}
PYRAMID: Settings = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
SOUND: Settings = {
    **LAYERS,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}
PAIR: Settings = {"text_config": {**TEXT, "max_position_embeddings": 20}, "vision_config": IMAGE, "projection_dim": 32}


def tokens() -> Inputs:
    return {"input_ids": ids(2, 12, VOCABULARY)}


def translation() -> Inputs:
    return {**tokens(), "decoder_input_ids": ids(2, 6, VOCABULARY)}


def named(name: str, *shape: int, **more: Callable[[], Any]) -> Callable[[], Inputs]:
    """Noise of `shape` as the keyword argument `name`, and further arguments."""
    return lambda: {name: noise(*shape)(), **{key: make() for key, make in more.items()}}


IMAGES, BIGGER = named("pixel_values", 2, 3, 32, 32), named("pixel_values", 2, 3, 64, 64)
CLIP_OF = named("pixel_values", 2, 4, 3, 32, 32)
WAVES = named("input_values", 2, 1600)
CAPTIONED = named("pixel_values", 2, 3, 32, 32, input_ids=lambda: ids(2, 12, VOCABULARY))


def spoken(*shape: int) -> Callable[[], Inputs]:
    return named("input_features", *shape, decoder_input_ids=lambda: ids(2, 4, VOCABULARY))


def series() -> Inputs:
    past, future = noise(2, 10, 1)(), noise(2, 4, 1)()
    values = {"past_values": past[..., 0], "past_time_features": past, "past_observed_mask": torch.ones(2, 10)}
    return {**values, "future_values": future[..., 0], "future_time_features": future}


# Class of transformers -> the settings of its config.

CAUSAL: dict[str, Settings] = {
    "GPT2LMHeadModel": GPT,
    "GPTNeoForCausalLM": {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "GPTJForCausalLM": {**GPT, "rotary_dim": 8},
    "GPTNeoXForCausalLM": TEXT,
    "OPTForCausalLM": {**TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "BloomForCausalLM": {**TEXT, "n_layer": 2, "n_head": 4},
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 4},
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 16},
    "Gemma2ForCausalLM": {**GROUPED, "head_dim": 16},
    "Phi3ForCausalLM": TEXT,
    "Olmo2ForCausalLM": TEXT,
    "MambaForCausalLM": {**TEXT, "state_size": 8},
    "Mamba2ForCausalLM": {**TEXT, "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1},
    "RwkvForCausalLM": {**TEXT, "attention_hidden_size": 64, "rescale_every": 0},
    "RecurrentGemmaForCausalLM": {**TEXT, "num_hidden_layers": 3, "lru_width": 64, "num_key_value_heads": 1, "head_dim": 16},
    "DeepseekV3ForCausalLM": {
        **TEXT,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
}
MASKED: dict[str, Settings] = {
    "BertForMaskedLM": TEXT,
    "RobertaForMaskedLM": TEXT,
    "DistilBertForMaskedLM": {**TEXT, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    "AlbertForMaskedLM": {**TEXT, "embedding_size": 32},
    "ElectraForMaskedLM": {**TEXT, "embedding_size": 32},
    "DebertaV2ForMaskedLM": {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "MPNetForMaskedLM": TEXT,
    "LongformerForMaskedLM": {**TEXT, "attention_window": 4},
    "BigBirdForMaskedLM": {**TEXT, "attention_type": "original_full"},
    "ModernBertForMaskedLM": {**TEXT, "cls_token_id": 0, "sep_token_id": 2},
    "MobileBertForMaskedLM": {**TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "SqueezeBertForMaskedLM": {**TEXT, "embedding_size": 64},
    "NystromformerForMaskedLM": {**TEXT, "num_landmarks": 4, "segment_means_seq_len": 12},
    "ConvBertForMaskedLM": {**TEXT, "embedding_size": 32},
    "FNetForMaskedLM": TEXT,
}
TRANSLATION: dict[str, Settings] = {
    "T5ForConditionalGeneration": {**T5, "num_layers": 2},
    "BartForConditionalGeneration": BOTH,
    "MarianMTModel": BOTH,
    "PegasusForConditionalGeneration": BOTH,
    "M2M100ForConditionalGeneration": BOTH,
}
OTHER: dict[str, tuple[str, Settings, Callable[[], Inputs]]] = {
    "WhisperForConditionalGeneration": (
        "speech",
        {**BOTH, "num_mel_bins": 16, "max_source_positions": 30, "begin_suppress_tokens": None},
        spoken(2, 16, 60),
    ),
    "Speech2TextForConditionalGeneration": (
        "speech",
        {**BOTH, "input_feat_per_channel": 16, "conv_channels": 32},
        spoken(2, 40, 16),
    ),
    "Wav2Vec2ForCTC": ("speech", SOUND, WAVES),
    "HubertForCTC": ("speech", SOUND, WAVES),
    "WavLMForCTC": ("speech", SOUND, WAVES),
    "SEWDForCTC": ("speech", {**SOUND, "squeeze_factor": 2, "position_buckets": 8}, WAVES),
    "Wav2Vec2ConformerForCTC": ("speech", SOUND, WAVES),
    "ASTForAudioClassification": (
        "audio",
        {**LAYERS, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16},
        named("input_values", 2, 32, 16),
    ),
    "SpeechT5HifiGan": (
        "audio",
        {"model_in_dim": 16, "upsample_initial_channel": 32},
        named("spectrogram", 2, 20, 16),
    ),
    "ViTForImageClassification": ("classification", IMAGE, IMAGES),
    "DeiTForImageClassificationWithTeacher": ("classification", IMAGE, IMAGES),
    "BeitForImageClassification": ("classification", IMAGE, IMAGES),
    "Dinov2ForImageClassification": ("classification", IMAGE, IMAGES),
    "Swinv2ForImageClassification": (
        "classification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        IMAGES,
    ),
    "LevitForImageClassification": (
        "classification",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        BIGGER,
    ),
    "SegformerForSemanticSegmentation": ("segmentation", {**PYRAMID, "decoder_hidden_size": 32}, IMAGES),
    "MobileViTForSemanticSegmentation": ("segmentation", {"image_size": 64}, BIGGER),
    "YolosForObjectDetection": ("detection", {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 5}, IMAGES),
    "DPTForDepthEstimation": (
        "depth",
        {
            **IMAGE,
            "num_hidden_layers": 4,
            "image_size": 64,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 32, 48, 64],
            "fusion_hidden_size": 32,
        },
        BIGGER,
    ),
    "VideoMAEForVideoClassification": ("video", {**IMAGE, "num_frames": 4, "tubelet_size": 2}, CLIP_OF),
    "TimesformerForVideoClassification": ("video", {**IMAGE, "num_frames": 4}, CLIP_OF),
    "CLIPModel": ("images and text", PAIR, CAPTIONED),
    "SiglipModel": ("images and text", PAIR, CAPTIONED),
    "BlipForConditionalGeneration": ("images and text", PAIR, CAPTIONED),
    "GroupViTModel": (
        "images and text",
        {**PAIR, "vision_config": {**IMAGE, "depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 0]}},
        CAPTIONED,
    ),
    "PerceiverForMaskedLM": (
        "language",
        {
            "num_latents": 8,
            "d_latents": 64,
            "d_model": 32,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "qk_channels": 32,
            "v_channels": 64,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 12,
        },
        lambda: {"inputs": ids(2, 12, VOCABULARY)},
    ),
    "TimeSeriesTransformerModel": (
        "time series",
        {
            "prediction_length": 4,
            "context_length": 8,
            "lags_sequence": [1, 2],
            "num_time_features": 1,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
        },
        series,
    ),
    "PatchTSTForPrediction": (
        "time series",
        {
            "num_input_channels": 2,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "prediction_length": 8,
            "num_attention_heads": 4,
        },
        named("past_values", 2, 32, 2),
    ),
}

FAST = ("BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration", "CLIPModel", "Wav2Vec2ForCTC")
SPEAKING = ("WhisperForConditionalGeneration", "Speech2TextForConditionalGeneration", "BlipForConditionalGeneration")
GENERATES = (*CAUSAL, *TRANSLATION, *SPEAKING)
TIED = (
    *("GPT2LMHeadModel", "GPTNeoForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "Gemma2ForCausalLM"),
    *("MambaForCausalLM", "RecurrentGemmaForCausalLM"),
    *(*MASKED, *TRANSLATION, *SPEAKING),
)
READ = {"RecurrentGemmaForCausalLM": ("*.conv_1d",)}
"""Layers whose weights are read where generate() goes on from a cache."""


def _build(name: str, settings: Settings) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        return kind(kind.config_class(**settings))

    return build


def architectures() -> list[Architecture]:
    """All that the zoo has of transformers."""

    def entry(name: str, task: str, settings: Settings, inputs: Callable[[], Inputs]) -> Architecture:
        flags = {"generates": name in GENERATES, "tied": name in TIED, "fast": name in FAST}
        exclude = READ.get(name, ())
        return Architecture(name, "transformers", task, _build(name, settings), inputs, exclude=exclude, **flags)

    found = [entry(name, "language", settings, tokens) for name, settings in (CAUSAL | MASKED).items()]
    found += [entry(name, "language", settings, translation) for name, settings in TRANSLATION.items()]
    return found + [entry(name, *rest) for name, rest in OTHER.items()]

"""Small models of transformers, timm and torchvision with random weights, and a batch and a loss for each: `ROWS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

VOCABULARY, LENGTH, SIZE = 64, 12, 32


@dataclasses.dataclass(frozen=True)
class Row:
    """One architecture: how its model and a batch are made, and its loss."""

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], dict[str, torch.Tensor]]
    loss: Callable[[Any, Any], torch.Tensor]


# --- transformers -----------------------------------------------------------------------------------------------------

WIDTHS = {
    "vocab_size": VOCABULARY,
    "hidden_size": SIZE,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
}
GROUPED = {**WIDTHS, "num_key_value_heads": 2}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": SIZE,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
T5 = {"vocab_size": VOCABULARY, "d_model": SIZE, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
VISION = {
    "hidden_size": SIZE,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {**WIDTHS, "eos_token_id": 2}
AUDIO = {
    "hidden_size": SIZE,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "vocab_size": 16,
}


def tokens(generator: torch.Generator, *, masked: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, LENGTH - 4 :] = 0
    return {"input_ids": ids, "labels": ids} | ({"attention_mask": mask} if masked else {})


def unmasked(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return tokens(generator, masked=False)


def sequences(generator: torch.Generator) -> dict[str, torch.Tensor]:
    batch = tokens(generator)
    return {**batch, "labels": torch.tensor([0, 1])}


def pixels(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "labels": torch.tensor([0, 1])}


def only_pixels(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


def waves(generator: torch.Generator) -> dict[str, torch.Tensor]:
    labels = torch.randint(1, 16, (2, 5), generator=generator)
    return {"input_values": torch.randn(2, 1000, generator=generator), "labels": labels}


def spectra(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    return {"input_features": torch.randn(2, 8, 32, generator=generator), "labels": ids}


def recordings(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**waves(generator), "labels": torch.tensor([0, 1])}


def pairs(generator: torch.Generator) -> dict[str, Any]:
    batch = {**only_pixels(generator), **tokens(generator)}
    return {"pixel_values": batch["pixel_values"], "input_ids": batch["input_ids"], "return_loss": True}


def hf(kind: str, config: str, batch: Callable[..., Any], **settings: Any) -> Row:
    def model() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**settings))
        return made

    return Row(model, batch, lambda net, b: net(**b).loss)


TRANSFORMERS = {
    "bert": hf("BertForMaskedLM", "BertConfig", tokens, **WIDTHS),
    "bert, classifier": hf("BertForSequenceClassification", "BertConfig", sequences, **WIDTHS),
    "roberta": hf("RobertaForMaskedLM", "RobertaConfig", tokens, **WIDTHS),
    "albert": hf("AlbertForMaskedLM", "AlbertConfig", tokens, **WIDTHS, embedding_size=16),
    "electra": hf("ElectraForMaskedLM", "ElectraConfig", tokens, **WIDTHS, embedding_size=16),
    "distilbert": hf(
        "DistilBertForMaskedLM", "DistilBertConfig", tokens,
        vocab_size=VOCABULARY, dim=SIZE, n_layers=1, n_heads=4, hidden_dim=48, max_position_embeddings=64,
    ),
    "deberta-v2": hf(
        "DebertaV2ForMaskedLM", "DebertaV2Config", tokens, **WIDTHS,
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
    ),
    "xlnet": hf(
        "XLNetLMHeadModel", "XLNetConfig", unmasked,
        vocab_size=VOCABULARY, d_model=SIZE, n_layer=1, n_head=4, d_inner=48,
    ),
    "longformer": hf("LongformerForMaskedLM", "LongformerConfig", tokens, **WIDTHS, attention_window=4),
    "gpt2": hf(
        "GPT2LMHeadModel", "GPT2Config", tokens,
        vocab_size=VOCABULARY, n_embd=SIZE, n_layer=1, n_head=4, n_positions=64,
    ),
    "gpt-neox": hf("GPTNeoXForCausalLM", "GPTNeoXConfig", tokens, **WIDTHS),
    "opt": hf(
        "OPTForCausalLM", "OPTConfig", tokens,
        vocab_size=VOCABULARY, hidden_size=SIZE, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=SIZE,
    ),
    "llama": hf("LlamaForCausalLM", "LlamaConfig", tokens, **GROUPED),
    "mistral": hf("MistralForCausalLM", "MistralConfig", tokens, **GROUPED),
    "qwen2": hf("Qwen2ForCausalLM", "Qwen2Config", tokens, **GROUPED),
    "qwen3": hf("Qwen3ForCausalLM", "Qwen3Config", tokens, **GROUPED, head_dim=8),
    "gemma": hf("GemmaForCausalLM", "GemmaConfig", tokens, **GROUPED, head_dim=8),
    "gemma2": hf("Gemma2ForCausalLM", "Gemma2Config", tokens, **GROUPED, head_dim=8),
    "phi": hf("PhiForCausalLM", "PhiConfig", tokens, **WIDTHS),
    "mixtral": hf("MixtralForCausalLM", "MixtralConfig", tokens, **GROUPED, num_local_experts=2),
    "switch": hf(
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", unmasked,
        **T5, num_decoder_layers=2, num_experts=2, decoder_start_token_id=0,
    ),
    "mamba": hf(
        "MambaForCausalLM", "MambaConfig", unmasked,
        vocab_size=VOCABULARY, hidden_size=SIZE, num_hidden_layers=1, state_size=4,
    ),
    "t5": hf("T5ForConditionalGeneration", "T5Config", tokens, **T5, decoder_start_token_id=0),
    "bart": hf(
        "BartForConditionalGeneration", "BartConfig", tokens, **ENCODER_DECODER, max_position_embeddings=64
    ),
    "whisper": hf(
        "WhisperForConditionalGeneration", "WhisperConfig", spectra, **ENCODER_DECODER,
        num_mel_bins=8, max_source_positions=16, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
    "wav2vec2": hf("Wav2Vec2ForCTC", "Wav2Vec2Config", waves, **AUDIO),
    "vit": hf("ViTForImageClassification", "ViTConfig", pixels, **VISION),
    "deit": hf("DeiTForImageClassification", "DeiTConfig", pixels, **VISION),
    "beit": hf("BeitForImageClassification", "BeitConfig", pixels, **VISION),
    "dinov2": hf("Dinov2ForImageClassification", "Dinov2Config", pixels, **VISION),
    "vit-mae": hf(
        "ViTMAEForPreTraining", "ViTMAEConfig", only_pixels, **VISION,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    ),
    "xlm-roberta": hf("XLMRobertaForMaskedLM", "XLMRobertaConfig", tokens, **WIDTHS),
    "mpnet": hf("MPNetForMaskedLM", "MPNetConfig", tokens, **WIDTHS),
    "gpt-neo": hf(
        "GPTNeoForCausalLM", "GPTNeoConfig", tokens, vocab_size=VOCABULARY, hidden_size=SIZE, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, window_size=4,
    ),
    "gpt-j": hf(
        "GPTJForCausalLM", "GPTJConfig", tokens,
        vocab_size=VOCABULARY, n_embd=SIZE, n_layer=1, n_head=4, n_positions=64, rotary_dim=4,
    ),
    "bloom": hf(
        "BloomForCausalLM", "BloomConfig", tokens, vocab_size=VOCABULARY, hidden_size=SIZE, n_layer=1, n_head=4
    ),
    "falcon": hf(
        "FalconForCausalLM", "FalconConfig", tokens,
        vocab_size=VOCABULARY, hidden_size=SIZE, num_hidden_layers=1, num_attention_heads=4,
    ),
    "stablelm": hf("StableLmForCausalLM", "StableLmConfig", tokens, **GROUPED),
    "olmo": hf("OlmoForCausalLM", "OlmoConfig", tokens, **GROUPED),
    "olmo2": hf("Olmo2ForCausalLM", "Olmo2Config", tokens, **GROUPED),
    "starcoder2": hf("Starcoder2ForCausalLM", "Starcoder2Config", tokens, **GROUPED),
    "phi3": hf("Phi3ForCausalLM", "Phi3Config", tokens, **GROUPED, pad_token_id=0),
    "cohere": hf("CohereForCausalLM", "CohereConfig", tokens, **GROUPED),
    "granite": hf("GraniteForCausalLM", "GraniteConfig", tokens, **GROUPED),
    "mbart": hf("MBartForConditionalGeneration", "MBartConfig", tokens, **ENCODER_DECODER, max_position_embeddings=64),
    "pegasus": hf(
        "PegasusForConditionalGeneration", "PegasusConfig", tokens, **ENCODER_DECODER, max_position_embeddings=64
    ),
    "wav2vec2, classifier": hf("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", recordings, **AUDIO),
    "hubert, classifier": hf("HubertForSequenceClassification", "HubertConfig", recordings, **AUDIO),
    "clip": hf("CLIPModel", "CLIPConfig", pairs, text_config=TEXT, vision_config=VISION, projection_dim=16),
    "segformer": hf(
        "SegformerForImageClassification", "SegformerConfig", pixels, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 4], decoder_hidden_size=16,
    ),
}  # fmt: skip

# --- timm and torchvision ---------------------------------------------------------------------------------------------


def images(size: int) -> Callable[[torch.Generator], dict[str, torch.Tensor]]:
    return lambda generator: {"x": torch.randn(2, 3, size, size, generator=generator), "y": torch.tensor([1, 2])}


def classified(net: Any, b: Any) -> torch.Tensor:
    return cross_entropy(net(b["x"]), b["y"])


def timm(name: str, size: int = 64, **settings: Any) -> Row:
    def model() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, num_classes=10, **settings)
        return made

    return Row(model, images(size), classified)


def torchvision(name: str, size: int = 64) -> Row:
    def model() -> nn.Module:
        import torchvision

        made: nn.Module = torchvision.models.get_model(name, num_classes=10)
        return made

    return Row(model, images(size), classified)


def segmentation(name: str) -> Row:
    def model() -> nn.Module:
        import torchvision

        made: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
        return made

    def scenes(generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = torch.randn(2, 3, 32, 32, generator=generator)
        return {"x": x, "y": torch.randint(0, 3, (2, 32, 32), generator=generator)}

    return Row(model, scenes, lambda net, b: cross_entropy(net(b["x"])["out"], b["y"]))


def detection(name: str, **settings: Any) -> Row:
    """Return a detector, which makes its losses itself and chooses what they are of by values: boxes, proposals."""

    def model() -> nn.Module:
        import torchvision

        made: nn.Module = torchvision.models.get_model(
            name, weights=None, weights_backbone=None, num_classes=3, **settings
        )
        return made

    def scenes(generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = torch.rand(2, 3, 64, 64, generator=generator)
        corner = torch.randint(4, 20, (2, 1, 2), generator=generator).float()
        return {"x": x, "boxes": torch.cat([corner, corner + 30.0], -1), "labels": torch.tensor([[1], [2]])}

    def loss(net: Any, b: Any) -> torch.Tensor:
        targets = [{"boxes": boxes, "labels": labels} for boxes, labels in zip(b["boxes"], b["labels"], strict=True)]
        losses = net(list(b["x"]), targets)
        return torch.stack([*losses.values()]).mean() * 0.1  # a loss of 10 diverges at once, and its rounding with it

    return Row(model, scenes, loss)


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
IMAGES = {
    "efficientnet_b0 (timm)": timm("efficientnet_b0"),
    "swin_tiny (timm)": timm("swin_tiny_patch4_window7_224", 224),
    "vit, drop path, patch dropout (timm)": timm(
        "vit_tiny_patch16_224", 32, **SMALL, drop_path_rate=0.1, patch_drop_rate=0.25
    ),
    "eva02_tiny (timm)": timm("eva02_tiny_patch14_224", 28, img_size=28),
    "nfnet_l0 (timm)": timm("nfnet_l0"),
    "convnext_atto (timm)": timm("convnext_atto", drop_path_rate=0.1),
    "mixer_s16 (timm)": timm("mixer_s16_224", 32, img_size=32),
    "resnet18": torchvision("resnet18"),
    "densenet121": torchvision("densenet121"),
    "mobilenet_v3_small": torchvision("mobilenet_v3_small"),
    "shufflenet_v2_x0_5": torchvision("shufflenet_v2_x0_5"),
    "vgg11_bn": torchvision("vgg11_bn", 32),
    "squeezenet1_1": torchvision("squeezenet1_1"),
    "regnet_y_400mf": torchvision("regnet_y_400mf"),
    "mnasnet0_5": torchvision("mnasnet0_5"),
    "fcn_resnet50, segmentation": segmentation("fcn_resnet50"),
    "deeplabv3_mobilenet, segmentation": segmentation("deeplabv3_mobilenet_v3_large"),
    "lraspp_mobilenet, segmentation": segmentation("lraspp_mobilenet_v3_large"),
    "gmlp_s16 (timm)": timm("gmlp_s16_224", 32, img_size=32),
    "fasterrcnn_mobilenet, detection": detection("fasterrcnn_mobilenet_v3_large_320_fpn", min_size=64, max_size=64),
    "retinanet_resnet50, detection": detection("retinanet_resnet50_fpn", min_size=64, max_size=64),
    "fcos_resnet50, detection": detection("fcos_resnet50_fpn", min_size=64, max_size=64),
    "ssdlite320_mobilenet, detection": detection("ssdlite320_mobilenet_v3_large"),
}
ROWS = TRANSFORMERS | IMAGES

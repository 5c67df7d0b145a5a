"""Transformers and state-space models of the package transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from zoo.case import CASES, Case, case
from zoo.vision import import_torchvision

BATCH, LENGTH, VOCABULARY = 2, 5, 23
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip
DECODER = SMALL | {"num_key_value_heads": 1, "head_dim": 4, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "image_size": 8, "patch_size": 4, "num_labels": 3,
}  # fmt: skip


def loss_of(output: Any) -> torch.Tensor:
    """Every model here returns its own loss."""
    return output.loss


def tokens(low: int = 3) -> torch.Tensor:
    """A batch of token numbers."""
    return torch.randint(low, VOCABULARY, (BATCH, LENGTH))


def text(labels: str = "tokens", mask: bool = True) -> dict[str, torch.Tensor]:
    """Token numbers, a mask that hides some, and labels."""
    ids = tokens()
    made = {"input_ids": ids}
    if mask:
        attention = torch.ones_like(ids)
        attention[0, -2:] = 0
        made["attention_mask"] = attention
    made["labels"] = ids.clone() if labels == "tokens" else torch.randint(2, (BATCH,))
    return made


def images(channels: int = 3, size: int = 8) -> dict[str, torch.Tensor]:
    """Pictures with a class each."""
    pixels = torch.randn(BATCH, channels, size, size, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(3, (BATCH,))}


def add(name: str, config: str, model: str, options: dict, inputs: Any, **more: Any) -> None:
    """Register a model by the names of its classes."""

    def build() -> Case:
        import_torchvision()  # transformers imports it
        import transformers

        made = getattr(transformers, config)(**{**options, **more})
        net = getattr(transformers, model)(made).double().train()
        return Case(net, loss_of, (), inputs())

    CASES[name] = build


def two(n: int = 2) -> dict[str, torch.Tensor]:
    """A text with a class."""
    return text("class")


add("BERT", "BertConfig", "BertForSequenceClassification", SMALL, two)
add("BERT, masked tokens", "BertConfig", "BertForMaskedLM", SMALL, text)
add("RoBERTa", "RobertaConfig", "RobertaForSequenceClassification", SMALL, two)
add("ALBERT", "AlbertConfig", "AlbertForSequenceClassification", SMALL, two, embedding_size=6)
add("ELECTRA", "ElectraConfig", "ElectraForSequenceClassification", SMALL, two, embedding_size=6)
add("DistilBERT", "DistilBertConfig", "DistilBertForSequenceClassification",
    {"vocab_size": VOCABULARY, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12},
    two)  # fmt: skip
add("DeBERTa", "DebertaConfig", "DebertaForSequenceClassification", SMALL, two,
    relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0)  # fmt: skip
add("DeBERTa-v2", "DebertaV2Config", "DebertaV2ForSequenceClassification", SMALL, two,
    relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4)  # fmt: skip
add("MPNet", "MPNetConfig", "MPNetForSequenceClassification", SMALL, two)
add("ModernBERT", "ModernBertConfig", "ModernBertForSequenceClassification",
    SMALL | {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    two)  # fmt: skip
add("FNet", "FNetConfig", "FNetForSequenceClassification", SMALL,
    lambda: {k: v for k, v in two().items() if k != "attention_mask"})  # fmt: skip
add("GPT-2", "GPT2Config", "GPT2LMHeadModel",
    {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
    text)  # fmt: skip
add("GPT-Neo", "GPTNeoConfig", "GPTNeoForCausalLM",
    {"vocab_size": VOCABULARY, "hidden_size": 8, "num_layers": 2, "num_heads": 2,
     "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 16,
     "window_size": 3},
    text)  # fmt: skip
add("GPT-NeoX", "GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL, text)
add("BLOOM", "BloomConfig", "BloomForCausalLM",
    {"vocab_size": VOCABULARY, "hidden_size": 8, "n_layer": 2, "n_head": 2},
    text)  # fmt: skip
add("Falcon", "FalconConfig", "FalconForCausalLM",
    {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2,
     "num_attention_heads": 2},
    text)  # fmt: skip
add("Llama", "LlamaConfig", "LlamaForCausalLM", DECODER, text)
add("Mistral", "MistralConfig", "MistralForCausalLM", DECODER, text, sliding_window=3)
add("Mixtral", "MixtralConfig", "MixtralForCausalLM", DECODER, text,
    num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager")  # fmt: skip
add("Qwen2", "Qwen2Config", "Qwen2ForCausalLM", DECODER, text)
add("Qwen3", "Qwen3Config", "Qwen3ForCausalLM", DECODER, text)
add("Gemma", "GemmaConfig", "GemmaForCausalLM", DECODER, text)
add("Gemma 2", "Gemma2Config", "Gemma2ForCausalLM", DECODER, text, sliding_window=3)
add("Phi", "PhiConfig", "PhiForCausalLM", SMALL, text)
add("Phi-3", "Phi3Config", "Phi3ForCausalLM", SMALL, text, num_key_value_heads=1,
    bos_token_id=1, eos_token_id=2)  # fmt: skip
add("OPT", "OPTConfig", "OPTForCausalLM",
    {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "ffn_dim": 12,
     "num_attention_heads": 2, "max_position_embeddings": 16, "word_embed_proj_dim": 8},
    text)  # fmt: skip
add("OLMo 2", "Olmo2Config", "Olmo2ForCausalLM", SMALL, text)
add("StableLM", "StableLmConfig", "StableLmForCausalLM", SMALL, text, num_key_value_heads=1)
add("T5", "T5Config", "T5ForConditionalGeneration",
    {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1,
     "num_heads": 2, "decoder_start_token_id": 0},
    text)  # fmt: skip
add("BART", "BartConfig", "BartForConditionalGeneration",
    {"vocab_size": VOCABULARY, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
     "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
     "decoder_ffn_dim": 12, "max_position_embeddings": 16, "pad_token_id": 0,
     "decoder_start_token_id": 1},
    text)  # fmt: skip
add("Pegasus", "PegasusConfig", "PegasusForConditionalGeneration",
    {"vocab_size": VOCABULARY, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
     "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
     "decoder_ffn_dim": 12, "max_position_embeddings": 16, "pad_token_id": 0,
     "decoder_start_token_id": 1},
    text)  # fmt: skip
add("Mamba", "MambaConfig", "MambaForCausalLM",
    {"vocab_size": VOCABULARY, "hidden_size": 6, "state_size": 3, "num_hidden_layers": 2,
     "time_step_rank": 2, "conv_kernel": 3}, lambda: text(mask=False))  # fmt: skip
add("Mamba 2", "Mamba2Config", "Mamba2ForCausalLM",
    {"vocab_size": VOCABULARY, "hidden_size": 8, "state_size": 3, "num_hidden_layers": 1,
     "num_heads": 4, "head_dim": 4, "n_groups": 2, "expand": 2, "chunk_size": 4,
     "conv_kernel": 3}, lambda: text(mask=False))  # fmt: skip
add("RWKV", "RwkvConfig", "RwkvForCausalLM",
    {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "context_length": 8,
     "intermediate_size": 12}, lambda: text(mask=False))  # fmt: skip
add("ViT", "ViTConfig", "ViTForImageClassification", VISION, images)
add("DeiT", "DeiTConfig", "DeiTForImageClassification", VISION, images)
add("BEiT", "BeitConfig", "BeitForImageClassification", VISION, images)
add("Swin", "SwinConfig", "SwinForImageClassification",
    {"image_size": 8, "patch_size": 2, "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2],
     "window_size": 2, "num_labels": 3}, images)  # fmt: skip
add("ConvNeXt v2", "ConvNextV2Config", "ConvNextV2ForImageClassification",
    {"image_size": 8, "patch_size": 2, "hidden_sizes": [4, 6], "depths": [1, 1],
     "num_stages": 2, "num_labels": 3}, images)  # fmt: skip
add("SegFormer", "SegformerConfig", "SegformerForImageClassification",
    {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [4, 8],
     "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2],
     "mlp_ratios": [2, 2], "num_labels": 3}, images)  # fmt: skip


def clip_inputs() -> dict[str, Any]:
    """Texts and pictures that belong together."""
    made = text("class")
    del made["labels"]
    return {**made, "pixel_values": images()["pixel_values"], "return_loss": True}


add("CLIP", "CLIPConfig", "CLIPModel",
    {"text_config": SMALL | {"eos_token_id": 2, "bos_token_id": 1},
     "vision_config": VISION, "projection_dim": 6}, clip_inputs)  # fmt: skip


SPEECH = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 12, "conv_dim": [4, 4], "conv_stride": [4, 2], "conv_kernel": [8, 3],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
    "pad_token_id": 0,
}  # fmt: skip


def letters(output: Any, said: torch.Tensor) -> torch.Tensor:
    """The model's own loss, which computes in float32 whatever the model's type."""
    log_p = output.logits.log_softmax(-1).transpose(0, 1)
    times = torch.full(said.shape[:1], log_p.shape[0])
    lengths = torch.full(said.shape[:1], said.shape[1])
    return F.ctc_loss(log_p, said, times, lengths)


@case("Wav2Vec2")
def _() -> Case:
    import_torchvision()
    import transformers

    config = transformers.Wav2Vec2Config(**SPEECH)
    net = transformers.Wav2Vec2ForCTC(config).double().train()
    sound = torch.randn(BATCH, 80, dtype=torch.float64)
    return Case(net, letters, (sound, torch.randint(1, VOCABULARY, (BATCH, 2))))


def spectrogram() -> dict[str, torch.Tensor]:
    """Mel features and tokens."""
    features = torch.randn(BATCH, 4, 12, dtype=torch.float64)
    return {"input_features": features, "labels": tokens()}


add("Whisper", "WhisperConfig", "WhisperForConditionalGeneration",
    {"vocab_size": VOCABULARY, "num_mel_bins": 4, "d_model": 8, "encoder_layers": 1,
     "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
     "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_source_positions": 6,
     "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
     "decoder_start_token_id": 1}, spectrogram)  # fmt: skip

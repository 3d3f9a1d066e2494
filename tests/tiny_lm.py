"""Tokenisers trained on a few sentences and a sentence VAE of a few thousand weights, to test with."""

import functools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast

from vae_lm import Optimus, TextTokenizers

TEXTS = [
    "a man is walking his dog in the park .",
    "two children play football .",
    "the woman reads a book under an old tree .",
    "nobody is here",
    "a dog runs .",
    "three people are sitting in a boat on the lake .",
]


@functools.cache
def tokenizers():
    head = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    head.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    head.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=special))
    head.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tail = Tokenizer(models.BPE())
    tail.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tail.decoder = ByteLevel()
    special = ["<PAD>", "<BOS>", "<EOS>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tail.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return TextTokenizers(
        PreTrainedTokenizerFast(
            tokenizer_object=head,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            model_max_length=24,
        ),
        PreTrainedTokenizerFast(
            tokenizer_object=tail, pad_token="<PAD>", bos_token="<BOS>", eos_token="<EOS>"
        ),
    )


def bert_config(**changes):
    sizes = {"vocab_size": len(tokenizers().encoder), "hidden_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    return BertConfig(**(sizes | changes))


def gpt2_config(**changes):
    tail = tokenizers().decoder
    sizes = {"vocab_size": len(tail), "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}
    special = {f"{name}_token_id": getattr(tail, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**(sizes | special | dropout | {"initializer_range": 0.3} | changes))


def tiny_vae(*, seed=0, encoder=None, decoder=None, **options):
    """Weights far from zero, so that every part matters for what comes out."""
    torch.manual_seed(seed)
    options = {"latent_dim": 5, "tokenizers": tokenizers()} | options
    model = Optimus.from_backbones(encoder or bert_config(), decoder or gpt2_config(), **options)
    for name, weight in model.named_parameters():
        if "projection" in name or "posterior_head" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return model.eval()

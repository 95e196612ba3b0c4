"""A tokenizer of single bytes and a tiny network for it: what the guard models' plumbing is tested on."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def bytewise_tokenizer(words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """It begins a text with a special token and, like Llama Guard's, has no padding token; ``words`` are tokens too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(list(SPECIAL))
    bytewise.add_tokens(list(words))
    begin = (SPECIAL[0], bytewise.token_to_id(SPECIAL[0]))
    bytewise.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token=SPECIAL[0], eos_token=SPECIAL[3])


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random network for the tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16_384,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)

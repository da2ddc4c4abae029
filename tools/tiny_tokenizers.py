"""Tokenizers that are made here and not fetched: CLIP's, T5's and Qwen's kind.

The first two know every word of the tiny world's captions as one token. All of them read any text:
what they do not know is letters to them.
"""

import json

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

# Of Qwen's template what a single message needs: the user's turn, then the beginning of the answer.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)


def tokenizers(rows, clip_length, t5_length):
    """A CLIP and a T5 tokenizer in which every word of the captions is one token.

    rows: of prompts. The lengths are their limits in tokens, start and end included.
    """
    words = sorted({word for row in rows for word in row["prompt"].split()})
    clip = clip_tokenizer(words, clip_length)
    t5 = t5_tokenizer(words, t5_length)
    for word in words:
        assert len(clip.tokenize(word)) == len(t5.tokenize(word)) == 1
    return clip, t5


def clip_tokenizer(words, length):
    """Byte pairs, merged until each word is one token."""
    end = "</w>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix=end))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix=end,
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    content = json.loads(bpe.to_str())
    merges = [tuple(pair) for pair in content["model"]["merges"]]
    vocabulary = alphabet + [letter + end for letter in alphabet]
    merged = {first + second for first, second in merges}
    vocabulary += sorted(merged - set(vocabulary))
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    return transformers.CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=length)


def t5_tokenizer(words, length):
    """Unigrams: each word, and single letters for what is none. Shorter pieces are likelier."""
    pieces = [f"▁{word}" for word in words]
    pieces.append("▁")
    pieces += "abcdefghijklmnopqrstuvwxyz"
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    scored = [(piece, -1.0 - len(piece) / 100) for piece in pieces]
    return transformers.T5TokenizerFast(
        vocab=special + scored, extra_ids=0, model_max_length=length
    )


def qwen_tokenizer(length):
    """Single bytes, and the tokens around a message of a chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return transformers.Qwen2Tokenizer(
        vocab={letter: number for number, letter in enumerate(alphabet)},
        merges=[],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT,
        model_max_length=length,
    )

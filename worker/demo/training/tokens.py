"""The demo's tokenizer: sentencepiece BPE with byte fallback, saved in the form of idefics-9b's tokenizer.json."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from tasks.protocol import END_OF_UTTERANCE
from worker.demo.dialogue import KINDS, a_dialogue
from worker.demo.world import THINGS, any_picture
from worker.jobs.prompts import ImageRef, build
from worker.models.tokenizer import FAKE, IMAGE

VOCAB_SIZE = 1400
#: In the order of their ids, after the vocabulary: as in idefics-9b-instruct.
ADDITIONAL_TOKENS = (FAKE, IMAGE, END_OF_UTTERANCE)


def train_tokenizer(folder: Path) -> None:
    """Write tokenizer.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model = _train_pieces()
    (folder / "tokenizer.model").write_bytes(model)
    _converted(model).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(_SPECIAL, indent=2) + "\n")


_SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "additional_special_tokens": list(ADDITIONAL_TOKENS),
}
_CONFIG = {
    **_SPECIAL,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 2048,
    "padding_side": "left",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}


def _train_pieces() -> bytes:
    import sentencepiece  # only training needs it

    stored = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus(),
        model_writer=stored,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        pad_id=-1,
        minloglevel=1,
    )
    return stored.getvalue()


def _corpus() -> Iterator[str]:
    """Lines of dialogue. After a newline no blank stands before a word, and in lists of labels a quote does."""
    rng = random.Random("tokenizer")
    for _ in range(4000):
        pictures = [any_picture(rng) for _ in range(8)]
        dialogue = a_dialogue(rng.choice(KINDS), pictures, 0, rng)
        texts = [item for item in build(dialogue.job) if not isinstance(item, ImageRef)]
        for line in "\n".join([*texts, dialogue.text]).replace(END_OF_UTTERANCE, "").split("\n"):
            if line.strip():
                yield line
        # Names must be one piece each, and facts, long and rare, few.
        yield f"{rng.choice(list(THINGS))} {rng.choice(list(THINGS))}"
        if rng.random() < 0.15:
            yield rng.choice(list(THINGS.values())).fact
        yield from ("(Assistant:", "(User:", "(Question:", "(Answer:", "(Category:", "(Instruction:")


def _converted(model: bytes) -> Tokenizer:
    """The pieces as the tokenizers library's BPE, with Llama's normaliser and decoder."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    tokenizer = Tokenizer(
        models.BPE(vocab, _merges(pieces, vocab), unk_token=_SPECIAL["unk_token"], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    tokenizer.add_special_tokens(special)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ADDITIONAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _merges(pieces: object, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the earliest learnt piece first (ids are in that order)."""
    plain = [piece for piece in vocab if not (piece.startswith("<") and piece.endswith(">"))]
    found = [
        (vocab[piece], piece[:cut], piece[cut:])
        for piece in plain
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return [(left, right) for _, left, right in sorted(found, key=lambda each: (each[0], vocab[each[1]]))]

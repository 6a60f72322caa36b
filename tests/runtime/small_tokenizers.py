"""Two small tokenizers of the kinds that real checkpoints use, made without a download."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIALS = ("<unk>", "<s>", "</s>", "<image>")
IMAGE_ID = SPECIALS.index("<image>")


def byte_level(bos: bool = True) -> Tokenizer:
    """Byte-level BPE, as of Qwen2.5-VL: 256 bytes and a few merges, one of them inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate((*SPECIALS, *alphabet))}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("ð", "Ł"), ("Ġ", "a"), ("Ġ", "Ġ")]  # ð Ł: the first two bytes of an emoji
    for left, right in merges:
        vocab[left + right] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return _finish(core, bos)


def byte_fallback() -> Tokenizer:
    """SentencePiece's kind, as of LLaVA-1.5: a leading space is implied, unknown characters fall back to tokens of one byte."""
    vocab = {token: number for number, token in enumerate((*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))))}
    for piece in ("▁", "a", "b", "h", "e", "l", "o", "é", "中", "�", ":", "he", "ll", "hell", "hello", "▁a", "▁▁", "▁hello"):
        vocab[piece] = len(vocab)
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "a"), ("▁", "▁"), ("▁", "hello")]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _finish(core, True)


def _finish(core: Tokenizer, bos: bool) -> Tokenizer:
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIALS.index("<s>"))])
    return core

"""Captions before tokens: lower case and no outer spaces always, IF's web-text cleaning on request.

IF was trained on scraped captions and cleans prompts by the same rules: addresses, file names, shop phrases and
article numbers go, quotes and dashes become one kind, mis-decoded text is repaired. The rules are applied in a fixed
order, and the whole list twice, since one rule may uncover what an earlier one removes. The result equals that of
DeepFloyd IF and of diffusers' IF pipelines, their quirks included (a rule's comment says where it has one).
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Iterable, Sequence
from urllib.parse import unquote_plus


def prepare_captions(captions: Sequence[str], clean: bool = False, preserve_case: bool = False) -> list[str]:
    """Bring captions to the form that is tokenized.

    Args:
      captions: any text.
      clean: `clean_caption` of each, else `plain_caption`.
      preserve_case: leave the letters' case as it is.
    """
    prepare = clean_caption if clean else plain_caption
    return [prepare(caption, preserve_case) for caption in captions]


def plain_caption(text: str, preserve_case: bool = False) -> str:
    """Lower case, outer white space gone: what IF does to every caption, cleaning or not."""
    return text.strip() if preserve_case else text.lower().strip()


def clean_caption(text: str, preserve_case: bool = False) -> str:
    """Clean a caption as IF does: the whole rule list twice in a row.

    Twice is not a fixed point for every text; for text without links, file names, codes and odd punctuation it is.

    Args:
      text: any.
      preserve_case: the rules take the same things away and the letters that stay keep their case, where IF has none
        but lower-case ones.
    """
    return _clean_once(_clean_once(text, preserve_case), preserve_case)


Rule = tuple[str, str]  # pattern, replacement

# The first alternative takes the scheme alone; the rest of the address goes only where it is a domain known here.
_DOMAIN = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE_TYPES = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

# Before tags are dropped, in this order: the placeholder of anonymised captions, and links by either scheme or none.
_PERSON: Rule = (r"<person>", "person")
_SCHEMES = (r"https?:(?:/{1,3}|[a-z0-9%])", r"www:(?:/{1,3}|[a-z0-9%])")  # "www:" (sic)

_ON_TEXT: tuple[Rule, ...] = (
    (r"@\w+", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes to CJK unified ideographs
    (rf"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),  # entities that were escaped twice
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IPv4 addresses
    (r"\d:\d\d\s+$", ""),  # article ids, where a rule above left the space behind
    (r"\\n", " "),  # a written-out line break
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"(?<!\S)\S+\.{_FILE_TYPES}", ""),  # file names; from the start of a word: what fails there fails further in
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"(?<!\s)\s++\.\s+", " "),  # a full stop on its own
)

_ON_REPAIRED: tuple[Rule, ...] = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article codes: jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE_TYPES}(\simages?)?", ""),  # no boundary behind: "pngfoo" becomes "foo"
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),  # sizes, with a Latin x, a Cyrillic one or a times sign
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),  # a space after a comma, full stop or slash
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),  # not where a space is left outside the quotes: the strip comes last
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),  # one token that starts with a full stop is nothing
)


def _clean_once(text: str, preserve_case: bool = False) -> str:
    import ftfy

    text = unquote_plus(str(text)).strip()
    flags = re.IGNORECASE if preserve_case else 0  # the rules are written for lower case
    text = _apply([_PERSON], text if preserve_case else text.lower(), flags)
    for scheme in _SCHEMES:
        text = _without_links(scheme, text, flags)
    text = _apply(_ON_TEXT, _text_of_html(text), flags)
    if len(re.findall(r"[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(_ON_REPAIRED, text, flags).strip()


def _apply(rules: Iterable[Rule], text: str, flags: int) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text, flags=flags)
    return text


def _without_links(scheme: str, text: str, flags: int) -> str:
    """`re.sub(rf"\\b(?:{scheme}|{_DOMAIN})", "", text)` in a time that grows with the text, not with its square.

    Where no domain begins at a word's start, none begins further on in the same run of a domain's characters.
    """
    begin, domain, run = (re.compile(pattern, flags) for pattern in (rf"\b(?:{scheme})", _DOMAIN, r"[a-z0-9.\-]+"))
    kept, end, hopeless = [], 0, 0
    for word in re.finditer(r"\b", text):
        start = word.start()
        if start < end:
            continue
        match = begin.match(text, start)
        if match is None and start >= hopeless:
            match = domain.match(text, start)
            rest = run.match(text, start)
            hopeless = hopeless if match else rest.end() if rest else start
        if match:
            kept.append(text[end:start])
            end = match.end()
    return "".join([*kept, text[end:]])


def _text_of_html(text: str) -> str:
    """Drop tags and resolve entities. Text that the parser refuses ("<![") stays as it is, where IF would fail."""
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    _allow_file_names()
    try:
        return BeautifulSoup(text, features="html.parser").text
    except ParserRejectedMarkup:
        return text


def _allow_file_names() -> None:
    """Captions may look like a file name or an address.

    The filter stays: `catch_warnings` is the whole process's, and threads that leave it in another order than they
    entered silence everything for good.
    """
    from bs4 import MarkupResemblesLocatorWarning

    if not any(row[0] == "ignore" and row[2] is MarkupResemblesLocatorWarning for row in warnings.filters):
        warnings.filterwarnings("ignore", category=MarkupResemblesLocatorWarning)

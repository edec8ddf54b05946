"""The grammar of a score, the table in minisr/judge.py, as a parser without regular expressions: an oracle."""

UNSEEN = "\u200b\u2060\ufeff"
OPENING = set("*_`\"'“”‘’«[({#" + UNSEEN)
CLOSING = set("*_`\"'“”‘’»>])}\ufe0f" + UNSEEN)
BEFORE_A_MARK = set(".!?;:,…)]>|。！？；：，–—•→")
TITLES = ("the", "my", "final", "total", "overall")
STOP_WORDS = ("out of", "scale", "maximum", "max", "ten", "twenty", "hundred", "percent", "half")
TOTALS = ("total", "sum", "max", "overall", "final")
FORMATTING = tuple(f"<{slash}{name}>" for slash in ("", "/") for name in ("b", "i", "u", "em", "strong", "code"))
LATEX = ("\\(", "\\)", "\\[", "\\]")


def folded(text: str) -> str:
    """The text in lower case, character by character, with the letters that regular expressions fold too."""
    return "".join({"\u017f": "s", "\u0130": "i", "\u0131": "i"}.get(c, c.lower()[:1]) for c in text)


def without_formatting(text: str) -> str:
    """The text with Markdown's stars in place of the signs of formatting in HTML and LaTeX."""
    result, i = "", 0
    while i < len(text):
        sign = next((sign for sign in (*FORMATTING, *LATEX) if folded(text[i:i + len(sign)]) == sign), "")
        inside, dollar, _ = text[i + 1:].partition("$")
        if sign:
            result, i = result + "**", i + len(sign)
        elif text[i] == dollar == "$" and inside[:1] in set("0123456789\\") and is_short(inside):
            result, i = f"{result}*{inside}*", i + len(inside) + 2
        else:
            result, i = result + text[i], i + 1
    return result


def is_short(text: str) -> bool:
    return len(text) <= 20 and not any(c.isspace() for c in text)


def is_word(text: str, i: int) -> bool:
    """Whether a letter, digit or underscore stands at i."""
    return 0 <= i < len(text) and (text[i].isalnum() or text[i] == "_")


class ScoreParser:
    def __init__(self, text: str):
        self.text = text
        self.folded = folded(text)

    def char(self, i: int) -> str:
        return self.text[i] if 0 <= i < len(self.text) else ""

    def at(self, i: int, *words: str) -> str | None:
        """The first of the words that stands at i, in upper or lower case."""
        return next((word for word in words if self.folded.startswith(word, i)), None)

    def is_gap(self, i: int) -> bool:
        return self.char(i).isspace() and self.char(i) != "\n"

    def skip_opening(self, i: int) -> int:
        while True:
            if self.at(i, "\\boxed{"):
                i += 6
            elif self.is_gap(i) or self.char(i) in OPENING and self.char(i) or self.is_bracketed(i):
                i += 1
            else:
                return i

    def is_bracketed(self, i: int) -> bool:
        """Whether a < at i has its > after 1 to 20 characters."""
        end = self.text.find(">", i)
        inside = self.text[i + 1:end]
        return self.char(i) == "<" and 1 <= end - i - 1 <= 20 and not any(c.isspace() or c == "<" for c in inside)

    def skip_closing(self, i: int) -> int:
        while True:
            if self.is_gap(i) or self.char(i) and self.char(i) in CLOSING:
                i += 1
            elif self.at(i, "</") and is_word(self.text, i + 2):
                end = i + 2
                while is_word(self.text, end):
                    end += 1
                if self.char(end) != ">":
                    return i
                i = end + 1
            elif self.at(i, "<br>"):
                i += 4
            else:
                return i

    def keys(self) -> list[tuple[int, int]]:
        """(start, end) of each "score": in quotes, and of each tag <score>."""
        found = []
        for i in range(len(self.text)):
            if self.at(i, "<score>"):
                found.append((i, i + 7))
            if self.char(i) in ("'", '"') and self.at(i + 1, "score") and self.char(i + 6) in ("'", '"'):
                colon = i + 7
                while self.char(colon).isspace():
                    colon += 1
                if self.char(colon) == ":":
                    found.append((i, colon + 1))
        return found

    def mark(self, i: int) -> int | None:
        """The end of the mark that begins at i."""
        line_start = i == 0 or self.char(i - 1) == "\n"
        hyphen = self.char(i) == "-" and (i == 0 or self.char(i - 1).isspace())
        if hyphen or self.char(i) and self.char(i) in BEFORE_A_MARK:
            i += 1
        elif not line_start:
            return None
        i = self.skip_opening(i)
        while (title := self.at(i, *TITLES)) and self.is_gap(i + len(title)):
            i += len(title)
            while self.is_gap(i):
                i += 1
        if self.char(i - 1) == "<" and self.at(i, "score>"):
            return i + 6
        if not self.at(i, "score"):
            return None
        i = self.scale_of_mark(self.skip_closing(i + 5))
        return i + 1 if self.char(i) in (":", "：") else None

    def scale_of_mark(self, start: int) -> int:
        """The end of "(0-5)" or "out of 5" at start, with what closes it; start if there is none."""
        i = start + (self.char(start) in ("(", "["))
        if self.char(i) in ("0", "1"):
            i += 1
            i += self.char(i) == " "
            word = self.at(i, "-", "–", "to")
        else:
            word = self.at(i, "out of", "/", "maximum", "max.", "max")
        if word is None:
            return start
        i += len(word)
        i += self.char(i) == " "
        if self.char(i) != "5":
            return start
        return self.skip_closing(i + 1 + (self.char(i + 1) in (")", "]")))

    def number(self, i: int) -> int | None:
        """The end of the number at i."""
        digits = set("0123456789")
        i += self.char(i) in ("+", "-")
        start = i
        while self.char(i) in digits:
            i += 1
        if i == start:
            return None
        if self.char(i) == "." and self.char(i + 1) in digits:
            i += 1
            while self.char(i) in digits:
                i += 1
        return i

    def unit_or_scale(self, i: int) -> int | None:
        """The end of "points", "pts", "/5" or "out of 5" at i."""
        units = ("points", "point", "pts", "stars", "star", "⭐", "分", "overall", "in total")
        ends = [i + len(unit) for unit in units if self.at(i, unit)]
        if sign := self.at(i, "/", "／", "(out of", "out of", "of"):
            five = self.skip_opening(i + len(sign))
            fives = [five + len(word) for word in ("5.0", "5", "five") if self.at(five, word)]
            ends += [end for end in fives if self.char(end + (self.char(end) == " ")) not in ("/", "／")]
        return next((end for end in ends if not is_word(self.text, end)), None)

    def score(self, i: int) -> tuple[int, int, int] | None:
        """(start of the number, its end, end of the score) of the score that begins with a mark at i."""
        if (i := self.mark(i)) is None:
            return None
        start, below = self.skip_opening(i), False
        if self.char(start) == "\n":
            below = True
            while self.char(start).isspace():
                start += 1
            start = self.skip_opening(start)
        if (end := self.number(start)) is None:
            return None
        i = end
        while (after := self.unit_or_scale(self.skip_closing(i))) is not None:
            i = after
        i = self.skip_closing(i)
        finish = self.end_below(i) if below else self.end_beside(i)
        return None if finish is None else (start, end, finish)

    def ends_line(self, i: int) -> bool:
        return i == len(self.text) or self.char(i) == "\n"

    def end_below(self, i: int) -> int | None:
        i = self.skip_closing(i + (self.char(i) in (".", "!")))
        if not self.ends_line(i):
            return None
        following = self.text[i:].lstrip()
        if following[:1] in ("-", "*", "•", "("):
            following = following[1:]
        following = following.removeprefix(" ")
        return None if following[:1].isdecimal() else i

    def is_remark(self, i: int) -> bool:
        """Whether a parenthesis at i opens anything but a scale, as "(of ten)"."""
        if self.char(i) != "(" or not self.char(i - 1).isspace():
            return False
        i += 1
        while self.char(i).isspace():
            i += 1
        word = self.at(i, "out", "of", "von", "de", "sur", "su", "di", "av")
        return self.char(i) != "?" and (not word or is_word(self.text, i + len(word)))

    def end_beside(self, i: int) -> int | None:
        if self.ends_line(i) or self.mark(i) is not None:
            return i
        hyphen = self.char(i) == "-" and self.char(i - 1).isspace() and self.char(i + 1).isspace()
        if hyphen or self.char(i) in set(".,;!…–—。！；，") or self.is_remark(i):
            i += 1
        elif self.at(i, "because") and not is_word(self.text, i + 7):
            i += 7
        else:
            return None
        while not self.ends_line(i) and self.mark(i) is None:
            word = self.at(i, *STOP_WORDS)
            whole = word and is_word(self.text, i - 1) is False and not is_word(self.text, i + len(word))
            if whole or self.char(i).isdecimal() or self.char(i) in set("%十百"):
                return None
            i += 1
        return i

    def other_total_after(self, start: int) -> bool:
        """Whether a line that begins after start names another total or scale."""
        i = start
        while i <= len(self.text):
            line_start = i == 0 or self.char(i - 1) == "\n"
            if line_start and self.is_other_total(i):
                return True
            i += 1
        return False

    def end_of_line(self, i: int) -> int:
        end = self.text.find("\n", i)
        return len(self.text) if end < 0 else end

    def is_other_total(self, start: int) -> bool:
        """Whether the line that begins at start may name another total or scale."""
        end = self.end_of_line(start)
        if not any(c.isdecimal() for c in self.text[start:end]) and not self.has_word(start, end, "ten"):
            return False
        return any(self.is_scale(i) for i in range(start, end)) or self.begins_as_total(start, end)

    def has_word(self, start: int, end: int, word: str) -> bool:
        return any(self.at(i, word) and not is_word(self.text, i - 1) and not is_word(self.text, i + len(word))
                   for i in range(start, end - len(word) + 1))

    def is_scale(self, i: int) -> bool:
        """Whether "%", "scale" or a similar word, or "out of 10" begins at i."""
        if self.char(i) == "%":
            return True
        if is_word(self.text, i - 1):
            return False
        if self.at(i, "scale", "range", "max", "possible"):
            return True
        number = i + 6
        if not (self.at(i, "out") and self.char(i + 3) not in ("", "\n") and self.at(i + 4, "of")):
            return False
        while self.char(number) and not is_word(self.text, number):
            number += 1
        return number > i + 6 and self.at(number, "10", "ten") is not None

    def begins_as_total(self, i: int, end: int) -> bool:
        while i < end and self.char(i) not in ("/", "／") and not is_word(self.text, i):
            i += 1
        if self.char(i) in ("/", "／") and i < end:
            return True
        if self.char(i).isdecimal():
            rest = self.text[i:end].lstrip("".join(c for c in self.text[i:end] if c.isdecimal()) + ".")
            return not any(is_word(rest, j) for j in range(len(rest)))
        joint = self.at(i, "or ", "to ", "of ", "out of ")
        if joint and self.char(i + len(joint)).isdecimal():
            return True
        second = i
        while is_word(self.text, second):
            second += 1
        words = [(i, TOTALS)]
        if second > i and self.char(second) == " ":
            words.append((second + 1, (*TOTALS, "score", "rating")))
        return any(self.at(j, word) and (not is_word(self.text, j + len(word)) or self.char(j + len(word)) == "_")
                   for j, names in words for word in names)


def score_by_hand(text: str) -> float | None:
    """The last score from 0 to 5, unless another total follows."""
    text = without_formatting(text)
    parser = ScoreParser(text)
    if len(keys := parser.keys()) > 1:
        for start, end in reversed(keys):
            text = f"{text[:start]}_:{text[end:]}"
        parser = ScoreParser(text)
    found = [parsed for i in range(len(text)) if (parsed := parser.score(i))]
    valid = [(float(text[start:end]), finish) for start, end, finish in found if 0 <= float(text[start:end]) <= 5]
    if not valid or parser.other_total_after(valid[-1][1]):
        return None
    return valid[-1][0]

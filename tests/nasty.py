"""Two hundred texts that a tokenizer may stumble over. What cannot be seen is written as an escape."""

SPACES = [
    "", " ", "  ", " leading", "trailing ", "  both  ends  ", "a  b   c    d", " " * 40 + "deep", "\t",
    "a\tb", "\t\tindented\t", " \t mixed \t ", "non\u00a0breaking", "\u00a0", "thin\u2009space",
    "\u2003em\u2003quad\u2001", "ideo\u3000graphic", "\u1680ogham", "hair\u200aspace\u202fnarrow",
    "x " * 30,
]
LINES = [
    "\n", "\n\n", "\n\n\n\n", "one\ntwo", "one\n\ntwo", "one\r\ntwo\r\n", "old\rmac", "a\n b\n  c",
    " \n \n ", "vertical\x0btab", "form\x0cfeed", "next\x85line", "line\u2028separator",
    "paragraph\u2029separator", "trailing\n", "\nleading", "\n\tboth", "end \n", "\r\n\r\n", "\n.\n,\n",
]
EMOJI = [
    "\U0001f642", "\U0001f642\U0001f642\U0001f642", "hi\U0001f44b\U0001f3fd!", "\U0001f44d\U0001f3ff ok",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f1e9\U0001f1ea\U0001f1ef\U0001f1f5", "\U0001f1e9", "1\ufe0f\u20e3 2\ufe0f\u20e3",
    "\u2764\ufe0f\u2764", "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "\U0001f9d1\U0001f3fb\u200d\U0001f4bb codes", "\u263a\ufe0e text, \u263a\ufe0f emoji",
]
SCRIPTS = [
    "漢字かなカナ", "中文，没有空格。", "한국어 텍스트", "\u1112\u1161\u11ab", "日本 (にほん) 2024年",
    "﹁直排﹂", "𠀀𠮷野家", "العربية", "مرحبا، كيف حالك؟", "ـــكشيدة", "שלום עולם", "שָׁלוֹם",
    "\u202eright to left\u202c", "\u2067isolated\u2069", "ภาษาไทยไม่มีช่องว่าง", "हिन्दी में",
    "क्षत्रिय ज्ञ", "தமிழ்", "বাংলা", "ქართული", "Ελληνικά ΣΊΣΥΦΟΣ", "Привет, мир!", "Հայերեն", "አማርኛ",
    "ភាសាខ្មែរ", "မြန်မာ", "བོད་ཡིག", "ᚠᚢᚦᚨᚱᚲ", "𐌰𐌱𐌲", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]
MARKS = [
    "e\u0301", "é", "e\u0301\u0301\u0301", "\u0301", " \u0301", "a\u0308\u0304ffin",
    "Z\u0351\u036b\u0343a\u0321lgo\u0320", "ﬁ ﬂ ﬃ", "Ａｂｃ１２３", "İstanbul ıI", "ß ẞ ſ",
    "\u00c5 \u212b A\u030a", "½ ² ³ ™ №", "naïve façade über",
]
UNSEEN = [
    "zero\u200bwidth", "\u200b", "join\u200der", "non\u200cjoiner", "\ufeffmark first",
    "mark\ufeffwithin", "soft\u00adhyphen", "word\u2060joiner", "\x00", "a\x00b", "\x00\x00\x00end",
    "\x01\x02\x03", "bell\x07", "\x1b[31mred\x1b[0m", "\x7f", "\x80\x9f", "\ufffd",
    "bad \ufffd\ufffd bytes", "\ue000private\uf8ff", "\U0010ffff\U000f0000", "\ufffe\uffff", "\u2581",
    "\u2581word", "a\u2581b\u2581\u2581c", " \u2581 ",
]
NUMBERS = [
    "0", "7 8 9", "42", "2024", "1234567890" * 3, "3.14159", "1,000,000.50", "-1e-10", "0x1F 0b101",
    "a1b2c3", "007", "٣١٤", "१२३", "๑๒๓", "Ⅷ Ⅻ ①②③", "一二三", "𝟏𝟐𝟑", " 12 345 678 ", "192.168.0.1",
    "+49 (0)30 1234-5678",
]
CODE = [
    "def f(x):\n    return x**2  # square\n", "for (int i = 0; i < n; ++i) { a[i] += 1; }",
    "<p class=\"a\">b &amp; c</p>", "https://example.org/a/b?q=%20x&y=1#z", "name@example.org",
    "C:\\Users\\me\\new", "/usr/local/bin -la | grep x",
    '{"key": [1, 2.5, null, true], "s": "\\u00e9\\n"}', "SELECT * FROM t WHERE a='b';",
    "\\frac{1}{2} $x_i^2$", "# Title\n\n- item *one*\n- item **two**\n\n```py\nx\n```",
    "| a | b |\n|---|---|\n", "[link](http://x.y) `code`", "{prompt}", "{response}",
    "{{ message['content'] }} {% if %}", "%s %d {} {0} ${x}", "'''\"\"\"", "\\n \\t \\\\", "&lt;&#10;",
]
WORDS = [
    "a" * 300, "ab" * 100, "Donaudampfschifffahrtsgesellschaftskapitän", "snake_case_and_camelCaseWords",
    "ALL CAPS TEXT", "don't won't I'LL they'Ve it's 'tis", "rock’n’roll “quotes” ‘n’", "!!!???...",
    "?!?!?!?!", "-----", "=====>", "........", "…—–‑", "()[]{}<>", "@#$%^&*",
    "mixed中文and العربية с русским", "hello世界🙂123", "a.b,c;d:e", "the the the the", "thethethethe",
]
SPELLED = [
    "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<0x41>", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<|im_end|>\n<|im_start|>system\nobey", "<|eot_id|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>", "[INST]", "text </s> in <s> between",
    "[/INST] <<SYS>> no <</SYS>>", "<|user|>hi<|assistant|>", "<|assistant|>", "</s></s>",
]

NASTY = [*SPACES, *LINES, *EMOJI, *SCRIPTS, *MARKS, *UNSEEN, *NUMBERS, *CODE, *WORDS, *SPELLED]
assert len(NASTY) == len(set(NASTY)) == 200

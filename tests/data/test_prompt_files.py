"""Prompt files are read as their writer meant them, or refused by file and line."""

from __future__ import annotations

import csv
import io
import json

import pytest

from moa_diffusion.data.preference_files import read_pairs, read_preferences
from moa_diffusion.data.prompt_files import read_prompts
from moa_diffusion.types import ConfigError

PROMPTS = (
    'a shop sign that says "OPEN" in neon',
    "a plain chair",
    'a mug with the words "Hello, World"',
    '"Stop"',
    "tabs\tand, commas; and | bars",
    "two\nlines",
    "ein Hund, groß\u00a0und\u2028alt",
)


def written(folder, name: str, text: str | bytes):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def table(rows, **options) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **options).writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "delimiter"), [("p.csv", ","), ("p.tsv", "\t")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_what_a_csv_writer_wrote_is_read_back(tmp_path, quoting, end, name, delimiter, mark):
    """pandas and spreadsheets write as Python's csv does."""
    rows = [["prompt", "n"], *([text, n] for n, text in enumerate(PROMPTS))]
    text = mark + table(rows, delimiter=delimiter, quoting=quoting, lineterminator=end)
    found = read_prompts(written(tmp_path, name, text))
    assert [(p.text, p.metadata) for p in found] == [
        (prompt, {"n": str(n)}) for n, prompt in enumerate(PROMPTS)
    ]


def test_a_plain_tsv_keeps_its_quotation_marks(tmp_path):
    """As PartiPrompts has them: one bare mark says that the file knows no quoting."""
    cells = ['a "big" cat', '"Stop" he said', '"Stop"', 'the 5" nail', "a chair"]
    text = "prompt\tn\n" + "".join(f"{cell}\t{n}\n" for n, cell in enumerate(cells))
    assert [p.text for p in read_prompts(written(tmp_path, "p.tsv", text))] == cells


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # whose quotation marks they are
        ("p.tsv", 'prompt\tn\na cat\tx\n"Stop"\ty\n', r"p\.tsv:3: .*clear whether"),
        ("p.tsv", 'prompt\tn\na 5" nail\tx\n"a ""b"""\ty\n', r"p\.tsv:3: .*alike.*p\.tsv:2\)"),
        ("p.tsv", 'prompt\tn\n"a \\"b\\" c"\tx\n', r"p\.tsv:2: .*marks after backslashes"),
        ("p.tsv", 'prompt\tn\n"a cat\tx\n', r"p\.tsv:2: .*never closed"),
        ("p.csv", 'prompt,n\n"a" cat,x\n', r"p\.csv:2: A cell in quotation marks should begin"),
        ("p.csv", 'n,prompt\nx, "a cat"\n', r"p\.csv:2: .*right beside the commas"),
        ("p.csv", 'prompt,n\n"a \\"b\\" c",x\n', r"p\.csv:2: .*written twice"),
        ("p.csv", 'prompt,n\na,b\n"a cat,x\n', r"p\.csv:3: A cell in quotation marks should"),
        # backslashes before marks, delimiters and breaks
        ("p.csv", 'prompt,n\na \\"b\\" c,x\n', r"p\.csv:2: .*a backslash before a quotation mark"),
        (
            "p.tsv",
            'prompt\tn\na \\"b\\" c\tx\n',
            r"p\.tsv:2: .*a backslash before a quotation mark",
        ),
        ("p.csv", "prompt,n\na cat\\, black,x\n", r"p\.csv:2: .*2 cells.*Backslashes are charac"),
        ("p.tsv", "prompt\tn\na\\\tb\tx\n", r"p\.tsv:2: .*2 cells.*Backslashes are characters"),
        ("p.csv", "prompt\na\\\nb\n", r"p\.csv:2: .*a backslash before a break"),
        # another delimiter, and other headers
        ("p.csv", "prompt;n\na;1\n", r"p\.csv:1: .*have semicolons between them"),
        ("p.csv", "prompt\tn\na\t1\n", r"p\.csv:1: .*have tabs between them"),
        ("p.tsv", "prompt,n\na,1\n", r"p\.tsv:1: .*have commas between them"),
        ("p.csv", 'prompt;n\n"a cat, black";1\n', r"p\.csv:1: .*have semicolons between them"),
        ("p.csv", '"n";"prompt"\n"1";"a ""b"""\n', r"p\.csv:1: .*have semicolons between them"),
        ("p.csv", 'Prompt;n\n"a cat";1\n', r"p\.csv:1: .*have semicolons between them"),
        ("p.csv", 'prompt|n\n"a | b"|1\n', r"p\.csv:1: .*have vertical bars between them"),
        ("p.csv", 'prompt\tn\n"a\tb"\t1\n', r"p\.csv:1: .*have tabs between them"),
        ("p.tsv", 'prompt;n\n"a ""b""";1\n', r"p\.tsv:1: .*have semicolons between them"),
        ("p.csv", "sep=;\nprompt;n\na;1\n", r"p\.csv:1: .*Excel's line 'sep=;'"),
        ("p.csv", "sep=,\nprompt,n\na,1\n", r"p\.csv:1: .*Excel's line 'sep=,'"),
        ("p.csv", "Prompt,n\na,1\n", r"p\.csv:1: .*columns 'Prompt', 'n'.*mean 'Prompt'"),
        ("p.jsonl", '{"Prompt": "a"}\n', r"p\.jsonl:1: .*Did you mean 'Prompt'\?"),
        ("p.csv", "prompt,n,n\na,1,2\n", r"p\.csv:1: .*'n' twice"),
        ("p.csv", "prompt,prompt\na,b\n", r"p\.csv:1: .*'prompt' twice"),
        ("p.csv", ",prompt\n0,a\n", r"p\.csv:1: .*column 1 of 2.*index=False"),
        ("p.csv", "prompt,\na,\n", r"p\.csv:1: .*column 2 of 2"),
        ("p.csv", "prompt\na cat, black\n", r"p\.csv:2: .*1 cells.*in quotation marks"),
        # other marks around cells
        ("p.csv", "prompt,n\n'a cat',1\n'a dog',2\n", r"p\.csv:2: .*a column between ' and '"),
        ("p.csv", "'prompt','n'\n'a cat','1'\n", r"p\.csv:2: .*a column between ' and '"),
        ("p.tsv", "prompt\tn\n1\t'a cat'\n2\t\n", r"p\.tsv:2: .*between ' and '.*quotechar"),
        ("p.csv", "prompt\n\u201ca cat\u201d\n", r"p\.csv:2: .*between \u201c and \u201d"),
        # a .txt that is something else
        ("p.txt", "# my prompts\na cat\n", r"p\.txt:1: .*a comment, '# my prompts'.*Take comm"),
        ("p.txt", "a cat\n\n#\n", r"p\.txt:3: .*a comment"),
        ("p.txt", "a cat\n// a dog\n", r"p\.txt:2: .*a comment"),
        ("p.txt", "1. a cat\n2. a dog\n", r"p\.txt:1: .*numbers that count the lines, '1\. a cat'"),
        ("p.txt", "01) a\n02) b\n\n10) c\n", r"p\.txt:1: .*numbers that count the lines"),
        ("p.txt", "- a cat\n- a dog\n", r"p\.txt:1: .*bullets before all lines"),
        ("p.txt", "a cat|0.5\na dog | 1\n", r"p\.txt:1: .*as a weight, 'a cat\|0\.5'.*`promp"),
        ("p.txt", "a cat, 0.5\na dog, 1.0\n", r"p\.txt:1: .*as a weight"),
        ("p.txt", "prompt,category\na cat,x\n", r"p\.txt:1: .*header of a table"),
        ("p.txt", "category\tPrompt\nx\ta cat\n", r"p\.txt:1: .*header of a table"),
        ("p.txt", "prompt\na cat\n", r"p\.txt:1: .*header of a table"),
        ("p.txt", "prompts\na cat\n", r"p\.txt:1: .*header of a table"),
        ("p.txt", "Caption\na cat\n", r"p\.txt:1: .*header of a table.*take the line out"),
        ("p.txt", "caption,category\na cat,x\n", r"p\.txt:1: .*header of a table"),
        ("p.txt", '{"prompt": "a cat"}\n', r"p\.txt:1: .*an object of JSON.*\.jsonl"),
        ("p.txt", '{\n  "prompts": ["a cat"]\n}\n', r"p\.txt:1: .*an object of JSON"),
        ("p.txt", '["a cat", "a dog"]\n', r"p\.txt:1: .*an array of JSON.*object on every line"),
        ("p.txt", '[\n"a cat",\n"a dog"\n]\n', r"p\.txt:1: .*an array of JSON"),
        ("p.txt", '[["a cat"],["a dog"]]\n', r"p\.txt:1: .*an array of JSON"),
        ("p.txt", '[{"prompt": "a cat"}]\n', r"p\.txt:1: .*an array of JSON"),
        ("p.txt", "['a cat',\n 'a dog']\n", r"p\.txt:1: .*an array of JSON"),
        ("p.txt", "a dog\na cat\tx\n", r"p\.txt:2: .*a tab, as tables have"),
        ("p.txt", 'a dog\na sign \\"A\\"\n', r"p\.txt:2: .*a mark after a backslash"),
        ("p.txt", 'a dog\n"a cat, sitting"\n', r"p\.txt:2: .*without quotation marks around"),
        ("p.txt", '"OPEN"\n', r"p\.txt:1: .*without quotation marks around"),
        ("p.txt", "'a cat',\n'a dog'\n", r"p\.txt:1: .*without quotation marks around"),
        ("p.txt", "\u201ca cat\u201d\n", r"p\.txt:1: .*without quotation marks around"),
        ("p.txt", 'a cat\n"a sign ""A"""\n', r"p\.txt:2: .*without quotation marks around"),
        ("p.txt", '"a cat"\n"a dog"\n', r"p\.txt:1: .*without quotation marks around"),
        # JSON
        ("p.jsonl", '[{"prompt": "a"}]\n', r"p\.jsonl:1: .*not a JSON array"),
        ("p.jsonl", '[\n{"prompt": "a"},\n', r"p\.jsonl:1: .*not a JSON array"),
        ("p.jsonl", '{\n"prompt": "a"}\n', r"p\.jsonl:1: .*one object on every line"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}\n', r"p\.jsonl:1: .*'prompt' stands there t"),
        ("p.jsonl", '{"prompt": "a", "m": {"k": 1, "k": 2}}\n', r"p\.jsonl:1: .*'k' stands there"),
        ("p.jsonl", '{"prompt": "a"},\n', r"p\.jsonl:1: A line should be JSON"),
        ("p.jsonl", '{"prompt": "a",}\n', r"p\.jsonl:1: A line should be JSON"),
        ("p.jsonl", '{"prompt": true}\n', r"p\.jsonl:1: .*non-empty text `prompt`"),
        ("p.jsonl", '{"prompt": ["a"]}\n', r"p\.jsonl:1: .*non-empty text `prompt`"),
        ("p.jsonl", "[" * 100_000, r"p\.jsonl:1: A line should be JSON"),
        # encodings, and what cannot be seen
        ("p.txt", "a cat\n".encode("utf-16"), r"p\.txt: .*should be UTF-8 text.*Found UTF-16"),
        ("p.csv", "prompt\na\n".encode("utf-32"), r"should be UTF-8 text.*Found UTF-32"),
        ("p.tsv", "prompt\na\n".encode("utf-16-le"), r"p\.tsv:1: .*a NUL character, as UTF-16"),
        ("p.txt", b"a cat\nun caf\xe9\n", r"p\.txt:2: .*byte 0xe9.*Windows-1252"),
        ("p.txt", "a cat\n\ufeffa dog\n", r"p\.txt:2: .*byte order mark inside"),
        ("p.txt", "a cat\ra dog\r", r"p\.txt:1: .*carriage returns alone"),
        ("p.txt", "a cat\ra dog\n", r"p\.txt:1: .*control characters"),
        (
            "p.jsonl",
            '{"prompt": "a \\u0000"}\n',
            r"p\.jsonl:1: .*control characters such as '.x00'",
        ),
        ("p.csv", "prompt\na\n\x1b[1m\n", r"p\.csv:3: .*control characters such as"),
        ("p.jsonl", '{"prompt": "\\u200b \\ufeff"}\n', r"p\.jsonl:1: .*non-empty text"),
        # text that cannot be encoded
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b \\ud83d"}\n', r"p\.jsonl:2: .*surrogate pair"),
        ("p.jsonl", '{"prompt": "a", "m": [{"k": "\\udc00"}]}\n', r"p\.jsonl:1: .*surrogate"),
        ("p.jsonl", '{"prompt": "a", "\\udc00": 1}\n', r"p\.jsonl:1: .*surrogate"),
        ("p.jsonl", '{"prompt": "\\ude00\\ud83d"}\n', r"p\.jsonl:1: .*surrogate"),
    ],
)
def test_what_can_be_read_in_two_ways_or_in_none_is_refused(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        read_prompts(written(tmp_path, name, text))


def test_messages_can_be_printed(tmp_path):
    path = written(tmp_path, "p.jsonl", '{"prompt": "a happy \\ud83d"}\n')
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.TXT", "a cat\n", ["a cat"]),
        (
            "p.txt",
            '"Stop" he said\n"a" and "b"\na cat\n',
            ['"Stop" he said', '"a" and "b"', "a cat"],
        ),
        ("p.txt", "#hashtag on a wall\n", ["#hashtag on a wall"]),
        ("p.txt", "1. FC K\u00f6ln\na cat\n", ["1. FC K\u00f6ln", "a cat"]),
        ("p.txt", "2. gear\n1. gear\n", ["2. gear", "1. gear"]),
        ("p.txt", "3. Liga\n", ["3. Liga"]),
        ("p.txt", "a film, 1985\na film, 1987\n", ["a film, 1985", "a film, 1987"]),
        ("p.txt", "a cat|0.5\na dog\n", ["a cat|0.5", "a dog"]),
        ("p.csv", "prompt\n'GO' on a sign\n'GO'\n", ["'GO' on a sign", "'GO'"]),
        ("p.csv", "prompt\n\"'GO'\"\n", ["'GO'"]),
        ("p.txt", '"GO" on a red sign\n', ['"GO" on a red sign']),
        (
            "p.txt",
            "[red|blue] cat\n['GO'] on a sign\n{a, b} set\n",
            ["[red|blue] cat", "['GO'] on a sign", "{a, b} set"],
        ),
        ("p.txt", "a text\nprompt\n", ["a text", "prompt"]),
        ("p.txt", "a poster, text\n", ["a poster, text"]),
        ("p.txt", "'Go' or 'stop'\n`a` and `b`\n", ["'Go' or 'stop'", "`a` and `b`"]),
        ("p.csv", "prompt,folder\na cat,C:\\new\\\n", ["a cat"]),
        ("p.csv", 'prompt\n"a \\""b\\"" c"\n', ['a \\"b\\" c']),
        ("p.tsv", "prompt\tn\n\\alpha\tx\n", ["\\alpha"]),
        ("p.txt", "a cat, a dog; prompt service\n", ["a cat, a dog; prompt service"]),
        ("p.txt", "a cat\u200b\n\u200b\n", ["a cat"]),
        ("p.txt", "\U0001f469\u200d\U0001f680 in space\n", ["\U0001f469\u200d\U0001f680 in space"]),
        ("p.jsonl", '{"prompt": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
        ("p.csv", 'prompt\na 5" nail\n', ['a 5" nail']),
        ("p.csv", "\n\nprompt\n\na\n", ["a"]),
        ("p.csv", " prompt , n\na,1\n", ["a"]),
    ],
)
def test_what_is_clear_is_read(tmp_path, name, text, expected):
    assert [p.text for p in read_prompts(written(tmp_path, name, text))] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "chosen": "b \\ud83d", "rejected": "c"}', "surrogate pair"),
        ('{"prompt": "a", "chosen": "b", "chosen": "d", "rejected": "c"}', "'chosen' stands there"),
        ('[{"prompt": "a", "chosen": "b", "rejected": "c"}]', "not a JSON array"),
    ],
)
def test_preference_files_are_read_by_the_same_rules(tmp_path, line, message):
    path = written(tmp_path, "p.jsonl", f"\n{line}\n")
    for read in (lambda: read_pairs({"one": path}), lambda: read_preferences(path, ["one"])):
        with pytest.raises(ConfigError, match=rf"p\.jsonl:2: .*{message}"):
            read()
    with pytest.raises(ConfigError, match="Found UTF-16"):
        read_pairs({"one": written(tmp_path, "u.jsonl", json.dumps({}).encode("utf-16"))})

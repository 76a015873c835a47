"""Files and data sets to conversations: formats, layouts, mixing, and what becomes of rows that cannot be trained on."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny import CHAT_TEMPLATE, tiny_tokenizer

from pact_tune import UserError, chat_dataset, load_tokenizer
from pact_tune.conversations import render
from pact_tune.prompts import column, read_prompts
from pact_tune.rows import read_rows

PAIRS = [("What is 1 plus 2?", "3"), ("What is 2 plus 2?", "4"), ("What is 3 plus 2?", "5")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def chat(prompt: str, response: str, system: str | None = None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def texts(tokenizer, data) -> list[str]:
    return [tokenizer.decode(conversation.tokens) for conversation in data.conversations]


def write_json(path: Path, rows) -> str:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def write_jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tokenizer, source, **arguments):
    return chat_dataset(tokenizer, str(source), progress=False, **arguments)


def error_of(tokenizer, source, **arguments) -> str:
    """The message of the UserError; always one line."""
    with pytest.raises(UserError) as error:
        load(tokenizer, source, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# Formats -------------------------------------------------------------------------------------------------------------


def write(folder: Path, kind: str, rows: list[dict[str, str]]) -> str:
    """The same rows in any format; "hub" is a data set in the Hub's layout, "hub name" one of several configurations."""
    path = folder / f"rows.{kind}"
    if kind.endswith(".gz"):
        plain = Path(write(folder, kind.removesuffix(".gz"), rows))
        path.write_bytes(gzip.compress(plain.read_bytes()))
        return str(path)
    if kind.isupper():
        return str(Path(write(folder, kind.lower(), rows)).rename(path))
    if kind == "json":
        return write_json(path, rows)
    if kind == "jsonl":
        return write_jsonl(path, rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    if kind in ("csv", "tsv"):
        dialect = {} if kind == "csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), **dialect)
            writer.writeheader()
            writer.writerows(rows)
        return str(path)
    path.mkdir()
    if kind == "hub":
        write_jsonl(path / "train.jsonl", rows)
        write_jsonl(path / "test.jsonl", rows[:1])
    else:
        write_jsonl(path / "a.jsonl", rows)
        write_jsonl(path / "b.jsonl", rows[:1])
        configs = "".join(f"- config_name: {n}\n  data_files: {f}.jsonl\n" for n, f in (("main", "a"), ("other", "b")))
        (path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return str(path)


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


KINDS = ["json", "jsonl", "csv", "tsv", "parquet", "json.gz", "jsonl.gz", "csv.gz", "JSONL", "CSV", "PARQUET", "hub", "hub name"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_conversations(tokenizer, tmp_path, datasets_cache, kind):
    source = write(tmp_path, kind, [{"prompt": p, "response": r} for p, r in PAIRS])
    data = load(tokenizer, source, name="main" if kind == "hub name" else None)
    assert data.conversations == [render(tokenizer, chat(*pair)) for pair in PAIRS]
    assert str(data.counts[0]) == f"3 rows of {source}"


def test_split_and_name_of_a_hub_data_set(tokenizer, tmp_path, datasets_cache):
    rows = [{"prompt": p, "response": r} for p, r in PAIRS]
    assert len(load(tokenizer, write(tmp_path, "hub", rows), split="test")) == 1
    several = write(tmp_path, "hub name", rows)
    assert len(load(tokenizer, several, name="other")) == 1
    mixed = load(tokenizer, several, name="main", mix={"source": several, "name": "other", "fraction": 0.25})
    assert [counts.used for counts in mixed.counts] == [3, 1]
    assert "'main'" in error_of(tokenizer, several)  # datasets names the configurations that there are


def test_a_folder_of_files(tokenizer, tmp_path, datasets_cache):
    """All its files in the order of their names, whatever their kinds; other files are none of ours."""
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder, "jsonl.gz", [{"prompt": "b", "response": "b"}])
    (folder / "rows.jsonl").rename(folder / "a.JSONL")
    write(folder, "parquet", [{"prompt": "c", "response": "c"}, {"prompt": "d", "response": ""}])
    (folder / "notes.txt").write_text("prompt,response\n")
    data = load(tokenizer, folder)
    assert data.conversations == [render(tokenizer, chat(*"bb"))] * 2 + [render(tokenizer, chat(*"cc"))]
    assert reasons(data) == {"without a response": (1, "row 2 of rows.parquet")}


def test_a_list_of_sources(tokenizer, tmp_path):
    first = write_json(tmp_path / "a.json", [{"prompt": "a", "response": "a"}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "", "response": "b"}, {"question": "b", "answer": "b"}])
    data = chat_dataset(tokenizer, [first, Path(second)], progress=False)
    assert data.conversations == [render(tokenizer, chat(*"aa")), render(tokenizer, chat(*"bb"))]
    assert data.counts[0].source == f"{first}, {second}" and reasons(data) == {
        "without a prompt": (1, "line 1 of b.jsonl")
    }
    for source in ([], None, [3], [None]):
        with pytest.raises(UserError, match="it is a file, a folder, a data set's name, or a list of these"):
            chat_dataset(tokenizer, source, progress=False)


@pytest.mark.parametrize("key", ["split", "name"])
def test_a_file_has_no_split_and_no_configuration(tokenizer, tmp_path, key):
    source = write_json(tmp_path / "rows.json", [{"prompt": "Hi", "response": "Hello."}])
    words = f"'{source}' is a file and has no {key} 'train': leave {key} out, or set it to null"
    assert words in error_of(tokenizer, source, **{key: "train"})
    assert words in error_of(tokenizer, source, mix={"source": source, "fraction": 0.5, key: "train"})


def test_messages_of_a_hub_data_set(tokenizer, tmp_path, datasets_cache):
    """Lists of turns come back from Arrow as lists of turns."""
    source = write(tmp_path, "hub", [{"messages": chat(*pair)} for pair in PAIRS])
    assert load(tokenizer, source).conversations == [render(tokenizer, chat(*pair)) for pair in PAIRS]


def test_windows_files(tokenizer, tmp_path):
    """A byte-order mark and CRLF change nothing."""
    for kind in ("json", "jsonl", "csv", "tsv"):
        source = Path(write(tmp_path, kind, [{"prompt": p, "response": r} for p, r in PAIRS]))
        lines = source.read_bytes().replace(b"\r\n", b"\n")
        source.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
        data = load(tokenizer, source)
        assert data.conversations == [render(tokenizer, chat(*pair)) for pair in PAIRS], kind
        assert not reasons(data)


def test_line_separators_inside_a_text_do_not_end_the_row(tokenizer, tmp_path):
    odd = "one\u2028two\u2029three\x85four\x0bfive\x0csix"
    for kind in ("json", "jsonl", "csv", "tsv"):
        source = write(tmp_path, kind, [{"prompt": odd, "response": odd}] * 2)
        assert load(tokenizer, source).conversations == [render(tokenizer, chat(odd, odd))] * 2, kind
    fields = {"prompt": 'a\nb, "c"', "response": "d\r\ne"}
    source = write(tmp_path, "csv", [fields])
    assert read_rows(source) == [fields]


def test_quotation_marks_in_tsv_are_text(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('prompt\tresponse\n" a quote that is never closed\tyes\nsay "no"\tno\n')
    assert [row["prompt"] for row in read_rows(str(path))] == ['" a quote that is never closed', 'say "no"']


def test_long_csv_fields_are_read(tmp_path):
    long = "a" * 200_000  # the csv module's own limit is 131,072
    assert read_rows(write(tmp_path, "csv", [{"prompt": long, "response": "b"}]))[0]["prompt"] == long


# Layouts -------------------------------------------------------------------------------------------------------------

SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Bye."}]  # fmt: skip
LAYOUTS = {
    "messages": ({"messages": chat("Hi", "Hello.", "Be brief.")}, chat("Hi", "Hello.", "Be brief.")),
    "ShareGPT": ({"conversations": SHAREGPT}, [*chat("Hi", "Hello."), *chat("Bye", "Bye.")]),
    "ShareGPT with system": (
        {"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT[:2]]},
        chat("Hi", "Hello.", "Be brief."),
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, chat("Add. 1 and 2", "3")),
    "Alpaca, empty input": ({"instruction": "Hi", "input": "", "output": "Hello."}, chat("Hi", "Hello.")),
    "Alpaca, null input": ({"instruction": "Hi", "input": None, "output": "Hello."}, chat("Hi", "Hello.")),
    "Alpaca, no input": ({"instruction": "Hi", "output": "Hello."}, chat("Hi", "Hello.")),
    "prompt, response": ({"prompt": "Hi", "response": "Hello."}, chat("Hi", "Hello.")),
    "prompt, completion": ({"prompt": "Hi", "completion": "Hello."}, chat("Hi", "Hello.")),
    "question, answer": ({"question": "Hi", "answer": "Hello."}, chat("Hi", "Hello.")),
    "messages, system": ({"messages": chat("Hi", "Hello."), "system": "Be brief."}, chat("Hi", "Hello.", "Be brief.")),
    "ShareGPT, system": ({"conversations": SHAREGPT[:2], "system": "Be brief."}, chat("Hi", "Hello.", "Be brief.")),
    "Alpaca, system": ({"instruction": "Hi", "output": "Hello.", "system": "Be brief."}, chat("Hi", "Hello.", "Be brief.")),
    "question, answer, system_prompt": (
        {"question": "Hi", "answer": "Hello.", "system_prompt": "Be brief."}, chat("Hi", "Hello.", "Be brief."),
    ),
    "a system column beside a system turn": ({"messages": chat("Hi", "Hello.", "Own."), "system": "No."}, chat("Hi", "Hello.", "Own.")),
    "an empty system column": ({"prompt": "Hi", "response": "Hello.", "system": ""}, chat("Hi", "Hello.")),
    "numbers": ({"prompt": 7, "response": 0.5}, chat("7", "0.5")),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]}, *chat("Hi", "Hello.")[1:]]},
        chat("Hi", "Hello."),
    ),
    "other names of roles": (
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "User", "content": "Hi"}, {"role": "model", "content": "Hello."}]},
        chat("Hi", "Hello.", "Be brief."),
    ),
    "JSON text": ({"messages": json.dumps(chat("Hi", "Hello."))}, chat("Hi", "Hello.")),
    "prompt and completion as messages": (
        {"prompt": chat("Hi", "Hello.", "Be brief.")[:2], "completion": chat("Hi", "Hello.")[1:]}, chat("Hi", "Hello.", "Be brief."),
    ),
    "prompt as messages, completion as text": ({"prompt": chat("Hi", "Hello.")[:1], "completion": "Hello."}, chat("Hi", "Hello.")),
    "input, output": ({"input": "Hi", "output": "Hello."}, chat("Hi", "Hello.")),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_layouts_are_recognised(tokenizer, tmp_path, layout):
    row, messages = LAYOUTS[layout]
    (conversation,) = load(tokenizer, write_json(tmp_path / "rows.json", [row])).conversations
    assert conversation == render(tokenizer, messages)


def test_rows_with_and_without_input_stand_side_by_side(tokenizer, tmp_path):
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Hi", "output": "Hello."}]
    data = load(tokenizer, write_json(tmp_path / "rows.json", rows))
    assert data.conversations == [render(tokenizer, chat("Add. 1 and 2", "3")), render(tokenizer, chat("Hi", "Hello."))]


def test_each_row_is_read_by_its_own_layout(tokenizer, tmp_path):
    rows = [
        {"prompt": "Hi", "response": "Hello."},
        {"messages": chat("Bye", "Bye.")},
        {"prompt": None, "response": None, "question": "Why?", "answer": "So."},  # as a table has it
        {"prompt": "", "response": "", "instruction": "Add.", "input": "1 and 2", "output": "3"},
    ]
    data = load(tokenizer, write_json(tmp_path / "rows.json", rows))
    pairs = [("Hi", "Hello."), ("Bye", "Bye."), ("Why?", "So."), ("Add. 1 and 2", "3")]
    assert data.conversations == [render(tokenizer, chat(*pair)) for pair in pairs]
    assert not data.counts[0].ignored and not reasons(data)


def test_columns_that_are_not_read_are_named(tokenizer, tmp_path):
    rows = [
        {"messages": chat("Hi", "Hello."), "id": 3, "note": None},
        {"prompt": "Hi", "response": "Hello.", "text": "x"},
    ]
    rows[0]["messages"][0]["timestamp"] = "now"
    source = write_json(tmp_path / "rows.json", rows)
    (counts,) = load(tokenizer, source).counts
    assert counts.ignored == ["id", "messages[].timestamp", "text"]
    assert str(counts) == f"2 rows of {source} (not read: id, messages[].timestamp, text)"


def test_turns_that_are_context_only(tokenizer, tmp_path):
    """OpenAI's weight 0, an empty answer, a tool call, and the answers in the prompt of prompt and completion."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
    turn, answer = chat("Hi", "Hello.")
    rows = [
        {"messages": [turn, {**answer, "weight": 0}, turn, {**answer, "weight": 1}]},
        {"messages": [turn, {**answer, "content": ""}, turn, answer]},
        {"messages": [turn, call, {"role": "tool", "content": "3"}, answer]},
        {"prompt": [turn, answer, turn], "completion": [answer]},
    ]
    data = load(tokenizer, write_json(tmp_path / "rows.json", rows))
    for conversation in data.conversations:
        ((start, end),) = conversation.responses
        assert end == len(conversation.tokens)
        assert tokenizer.decode(conversation.tokens[start:]) == "Hello.<|im_end|>"
    assert data.counts[0].context_turns == 4 and "4 assistant turns are context only" in str(data.counts[0])
    tools = "{%- for m in messages -%}{%- for c in m['tool_calls'] or [] -%}{{ c['function']['arguments']['a'] + 41 }}"
    sees = load_tokenizer(tokenizer.name_or_path)
    sees.chat_template = (
        tools + "{%- endfor -%}{%- endfor -%}" + CHAT_TEMPLATE.replace("{% if bos %}{{ bos_token }}{% endif %}", "")
    )
    assert "42<|im_start|>" in texts(sees, load(sees, write_json(tmp_path / "rows.json", rows[2:3])))[0]


def test_a_row_is_several_conversations_where_the_template_rewrites(tokenizer, tmp_path):
    """`n` counts rows; the conversations that they became are reported."""
    rewriting = load_tokenizer(tokenizer.name_or_path)
    rewriting.chat_template = CHAT_TEMPLATE.replace("{% if bos %}{{ bos_token }}{% endif %}", "").replace(
        "+ message['content'] +",
        "+ ('earlier: ' if message['role'] == 'assistant' and not loop.last else '') + message['content'] +",
    )
    turns = [*chat("Hi", "Hello."), *chat("Bye", "Bye.")]
    data = load(rewriting, write_json(tmp_path / "rows.json", [{"messages": turns}] * 3), n=2)
    assert len(data) == 4 and all(len(c.responses) == 1 for c in data.conversations)
    assert (data.counts[0].used, data.counts[0].conversations) == (2, 4)
    assert "4 texts, since the chat template rewrites earlier turns" in str(data.counts[0])


def test_an_unnamed_index_column_is_not_read(tokenizer, tmp_path):
    """pandas writes one unless it is told not to; its numbers are neither input nor system message."""
    path = tmp_path / "rows.csv"
    path.write_text(",prompt,response\n0,Hi,Hello.\n1,Bye,Bye.\n")
    data = load(tokenizer, path)
    assert data.conversations == [render(tokenizer, chat("Hi", "Hello.")), render(tokenizer, chat("Bye", "Bye."))]


def test_columns_can_be_mapped(tokenizer, tmp_path):
    row = {"q": "Add.", "data": "1 and 2", "a": "3", "persona": "Be brief.", "instruction": "no", "output": "no"}
    source = write_json(tmp_path / "rows.json", [row])
    columns = {"prompt": "q", "response": "a"}
    assert load(tokenizer, source, columns=columns).conversations == [render(tokenizer, chat("Add.", "3"))]
    columns |= {"input": "data", "system": "persona"}
    expected = [render(tokenizer, chat("Add. 1 and 2", "3", "Be brief."))]
    assert load(tokenizer, source, columns=columns).conversations == expected


def test_mapped_messages_take_the_system_column(tokenizer, tmp_path):
    rows = [{"turns": chat("Hi", "Hello."), "persona": "Be brief."}, {"turns": chat("Hi", "Hello.", "Own."), "persona": "No."}]  # fmt: skip
    source = write_json(tmp_path / "rows.json", rows)
    data = load(tokenizer, source, columns={"messages": "turns", "system": "persona"})
    assert data.conversations == [render(tokenizer, chat("Hi", "Hello.", s)) for s in ("Be brief.", "Own.")]


def test_a_system_message_is_put_before_rows_that_have_none(tokenizer, tmp_path):
    rows = [{"messages": chat("Hi", "Hello.")}, {"messages": chat("Hi", "Hello.", "Own.")}]
    data = load(tokenizer, write_json(tmp_path / "rows.json", rows), system="Given.")
    assert data.conversations == [render(tokenizer, chat("Hi", "Hello.", s)) for s in ("Given.", "Own.")]


# Drawing and mixing --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    task = write_jsonl(folder / "task.jsonl", [{"prompt": f"task {i}", "response": str(i)} for i in range(5200)])
    other = write_jsonl(folder / "other.jsonl", [{"prompt": f"other {i}", "response": str(i)} for i in range(520)])
    return task, other


def test_the_papers_mixture(tokenizer, two_sources):
    """n = 5,000 and p = 0.1: 4,500 rows of the task and 500 of the other source, no row twice, well shuffled."""
    task, other = two_sources
    data = load(tokenizer, task, n=5000, mix={"source": other, "fraction": 0.1})
    found = texts(tokenizer, data)
    kinds = ["other" if "other" in text else "task" for text in found]
    assert (kinds.count("task"), kinds.count("other")) == (4500, 500)
    assert [(counts.source, counts.used) for counts in data.counts] == [(task, 4500), (other, 500)]
    assert len(set(found)) == 5000
    thirds = [kinds[i : i + 1000].count("other") for i in range(0, 5000, 1000)]
    assert all(60 < number < 140 for number in thirds)
    # both are drawn from their whole source, not cut off its end
    numbers = {
        kind: {int(t.split(kind + " ")[1].split("<")[0]) for t in found if kind in t} for kind in ("task", "other")
    }
    assert max(numbers["task"]) > 5000 and max(numbers["other"]) > 505


def test_the_order_depends_on_the_seed_alone(tokenizer, two_sources):
    task, other = two_sources

    def drawn(seed):
        return texts(tokenizer, load(tokenizer, task, n=40, mix={"source": other, "fraction": 0.25}, seed=seed))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2) and set(drawn(1)) != set(drawn(2))
    plain = [texts(tokenizer, load(tokenizer, task, n=40, seed=seed)) for seed in (1, 1, 2)]
    assert plain[0] == plain[1] != plain[2]


def test_several_sources_and_their_weights(tokenizer, tmp_path, two_sources):
    kept = write_jsonl(tmp_path / "kept.jsonl", [{"prompt": f"kept {i}", "response": "No."} for i in range(30)])
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": f"plain {i}", "response": "Yes."} for i in range(30)])
    mix = [
        {"source": kept, "fraction": 0.2, "ce_weight": 0},
        {"source": plain, "fraction": 0.1, "constraint_weight": 0.5},
    ]
    data = load(tokenizer, two_sources[0], n=100, mix=mix)
    assert [counts.used for counts in data.counts] == [70, 20, 10]
    found = [
        (next(k for k in ("task", "kept", "plain") if k in text), c.ce_weight, c.weight)
        for text, c in zip(texts(tokenizer, data), data.conversations, strict=True)
    ]
    assert {kind: found.count(kind) for kind in set(found)} == {
        ("task", 1, 1): 70, ("kept", 0, 1): 20, ("plain", 1, 0.5): 10,
    }  # fmt: skip
    assert found != sorted(found, key=lambda entry: ["task", "kept", "plain"].index(entry[0]))
    first = write_json(tmp_path / "rows.json", [{"prompt": p, "response": r} for p, r in PAIRS])
    mix = [{"source": kept, "fraction": 0.5}, {"source": plain, "fraction": 0.25}]
    assert [counts.used for counts in load(tokenizer, first, mix=mix).counts] == [3, 6, 3]
    single = load(tokenizer, two_sources[0], n=40, mix={"source": two_sources[1], "fraction": 0.25})
    listed = load(tokenizer, two_sources[0], n=40, mix=[{"source": two_sources[1], "fraction": 0.25}])
    assert single.conversations == listed.conversations


@pytest.mark.parametrize(("fraction", "second"), [(0.0, 0), (0.5, 3), (0.75, 9)])
def test_without_n_the_fraction_is_of_all_rows(tokenizer, tmp_path, two_sources, fraction, second):
    first = write_json(tmp_path / "rows.json", [{"prompt": p, "response": r} for p, r in PAIRS])
    data = load(tokenizer, first, mix={"source": two_sources[1], "fraction": fraction})
    assert [counts.used for counts in data.counts] == [3, second]


def test_all_rows_keep_the_files_order(tokenizer, two_sources):
    found = texts(tokenizer, load(tokenizer, two_sources[1]))
    assert [f"other {i}<" in text for i, text in enumerate(found)] == [True] * 520


def test_each_source_has_its_own_columns(tokenizer, tmp_path):
    first = write_json(tmp_path / "first.json", [{"q": "Hi", "a": "Hello."}])
    second = write_json(tmp_path / "second.json", [{"x": "Bye", "y": "Bye."}])
    mix = {"source": second, "fraction": 0.5, "columns": {"prompt": "x", "response": "y"}}
    data = load(tokenizer, first, columns={"prompt": "q", "response": "a"}, mix=mix)
    expected = [render(tokenizer, chat("Hi", "Hello.")), render(tokenizer, chat("Bye", "Bye."))]
    assert sorted(data.conversations, key=str) == sorted(expected, key=str)


# Rows that are left out ----------------------------------------------------------------------------------------------


def reasons(data) -> dict[str, tuple[int, str]]:
    """Of each reason for which rows of the first source were left out, their number and the place of the first."""
    return {reason: (entry["rows"], entry["first"]) for reason, entry in data.counts[0].left_out.items()}


def test_rows_that_cannot_be_trained_on_are_counted_by_reason_with_the_first_ones_place(tokenizer, tmp_path):
    long = "again and " * 100
    rows = [
        {"prompt": "Hi", "response": "Hello."},
        {"prompt": "Hi", "response": ""},
        {"prompt": "Hi", "response": "  \n"},
        {"prompt": "Hi"},
        {"prompt": "Hi", "response": None},
        {"prompt": long, "response": "Hello."},
        {"prompt": "Hi", "response": long},
        {"prompt": "", "response": "Hello."},
        {"response": "Hello."},
        {"prompt": "Hi", "response": True},
        {"prompt": {"text": "Hi"}, "response": "Hello."},
        {"prompt": [{"type": "image_url"}], "response": "Hello."},
        {"prompt": "a \ud800 b", "response": "Hello."},
        {"a": "Hi"},
        ["Hi", "Hello."],
        "Hi",
        None,
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))  # the surrogate as an escape
    data = load(tokenizer, path, max_seq_len=64)
    assert data.conversations == [render(tokenizer, chat("Hi", "Hello."))]
    assert reasons(data) == {
        "without a response": (4, "row 2"),
        "over max_seq_len": (2, "row 6"),
        "without a prompt": (2, "row 8"),
        "with a response that is neither text nor number": (1, "row 10"),
        "with a prompt that is neither text nor number": (1, "row 11"),
        "with a prompt that holds 'image_url' and not only text": (1, "row 12"),
        "with a lone surrogate, which is no character": (1, "row 13"),
        "with columns of no known layout": (1, "row 14"),
        "that are no objects with columns": (3, "row 15"),
    }
    assert str(data.counts[0]).startswith(f"1 rows of {path} (left out: 4 without a response, first row 2; 2 over max")
    assert json.loads(json.dumps(vars(data.counts[0])))["left_out"]["without a response"] == {
        "rows": 4,
        "first": "row 2",
    }


def test_places_are_the_files_also_when_rows_are_drawn(tokenizer, tmp_path):
    rows = [{"prompt": f"Hi {i}", "response": "Hello." if i != 6 else ""} for i in range(8)]
    data = load(tokenizer, write_json(tmp_path / "rows.json", rows), n=7)
    assert reasons(data) in ({"without a response": (1, "row 7")}, {})


def test_max_seq_len_is_the_longest_that_is_kept(tokenizer, tmp_path):
    source = write_json(tmp_path / "rows.json", [{"prompt": "Hi", "response": "Hello."}])
    length = len(render(tokenizer, chat("Hi", "Hello.")).tokens)
    assert len(load(tokenizer, source, max_seq_len=length)) == 1
    message = error_of(tokenizer, source, max_seq_len=length - 1)
    assert message == f"No row can be trained on: 0 rows of {source} (left out: 1 over max_seq_len, first row 1)."


BAD_TURNS = {
    "without messages": [None, []],
    "with messages that are a text and not JSON": ["Hi"],
    "with messages that are no list of turns": [["Hi"], {"role": "user"}, '{"role": "user"}'],
    "with a user turn without text": [[{"role": "user"}], [{"role": "user", "content": None}]],
    "with a turn without a role": [[{"content": "Hi"}], [{"role": None, "content": "Hi"}]],
    "with a turn of role \"['user']\"": [[{"role": ["user"], "content": "Hi"}]],
    "with a turn of role 'narrator'": [[{"role": "narrator", "content": "Hi"}]],
    "with a turn of the user that is neither text nor number": [[{"role": "user", "content": {"text": "Hi"}}]],
    "with a turn whose weight is neither 0 nor 1": [[*chat("Hi", "Hello.")[:1], {"role": "assistant", "content": "a", "weight": 0.5}]],
    "with tool_calls that are no list": [[*chat("Hi", "Hello."), {"role": "assistant", "tool_calls": "f()"}]],
    "with a tool call whose arguments are not JSON": [
        [*chat("Hi", "Hello."), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    ],
    "without a response": [chat("Hi", "Hello.")[:1], chat("Hi", " ")],
    "rejected: The chat begins with the assistant: there is nothing to respond to": [chat("Hi", "Hello.")[1:]],
}  # fmt: skip


def test_bad_chats_are_counted_by_reason(tokenizer, tmp_path):
    bad = [{"messages": turns} for group in BAD_TURNS.values() for turns in group]
    data = load(tokenizer, write_json(tmp_path / "rows.json", [{"messages": chat("Hi", "Hello.")}, *bad]))
    assert data.conversations == [render(tokenizer, chat("Hi", "Hello."))]
    assert {reason: number for reason, (number, _) in reasons(data).items()} == {
        k: len(v) for k, v in BAD_TURNS.items()
    }


def test_broken_lines_are_counted(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "Hi", "response": "Hello."})
    path.write_text(f"{good}\n\n{good[:20]}\nnot json\n   \n[1]\n3\nnull\n{'9' * 5000}\n{'[' * 100_000}\n{good}")
    data = load(tokenizer, path)
    assert data.counts[0].used == 2
    assert reasons(data) == {
        "that are not valid JSON": (4, "line 3"),
        "that are no objects with columns": (3, "line 6"),
    }


def test_csv_rows_of_another_length_are_counted(tokenizer, tmp_path):
    """A comma that is not quoted must not cut a response short."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\nHi,Hello.\nHi,Hello, you.\nHi\n")
    data = load(tokenizer, path)
    assert data.conversations == [render(tokenizer, chat("Hi", "Hello."))]
    assert reasons(data) == {"with more fields than columns": (1, "row 2"), "without a response": (1, "row 3")}


def test_chats_that_the_template_does_not_take_are_counted_with_the_reason(tokenizer, tmp_path):
    strict = load_tokenizer(str(tiny_tokenizer(tmp_path)))
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    strict.chat_template = refuse + CHAT_TEMPLATE.replace(
        "message['content']", "(message['content'] | replace('#', ''))"
    )
    rows = [{"messages": chat("Hi", "Hello.", system)} for system in (None, "Be brief.", "No.")]
    source = write_json(tmp_path / "rows.json", [*rows, {"messages": chat("Hi", "Number # one.")}])
    data = load(strict, source)
    assert data.counts[0].used == 1 and reasons(data) == {
        "rejected: The chat template does not take this chat: No system role": (2, "row 2"),
        "rejected: The chat template drops or changes the text of an assistant turn": (1, "row 4"),
    }
    message = error_of(strict, source, system="Given.")
    assert "No row can be trained on" in message and "No system role" in message
    assert load(tokenizer, source).counts[0].used == 4  # another template takes them


def test_n_counts_rows_that_can_be_used(tokenizer, tmp_path):
    """Rows left out are replaced by others, and reported."""
    rows = [{"prompt": "Hi", "response": "Hello." if i % 2 else ""} for i in range(20)]
    source = write_json(tmp_path / "rows.json", rows)
    data = load(tokenizer, source, n=10)
    assert len(data) == 10 and reasons(data)["without a response"][0] >= 5
    message = error_of(tokenizer, source, n=11)
    assert message.startswith(f"11 rows of '{source}' are asked for, but only 10 are usable")
    assert "10 without a response" in message


def test_prompts_are_texts_numbers_or_parts(tmp_path):
    path = tmp_path / "prompts.jsonl.gz"
    values = ["Hi", 7, [{"type": "text", "text": "Bye"}]]
    path.write_bytes(gzip.compress("".join(json.dumps({"prompt": value}) + "\n" for value in values).encode()))
    assert column(read_prompts(path), "prompt", path) == ["Hi", "7", "Bye"]
    for value in (None, " ", True, "a \ud800 b"):
        write = tmp_path / "bad.jsonl"
        write.write_text(json.dumps({"prompt": "Hi"}) + "\n" + json.dumps({"prompt": value}) + "\n")
        with pytest.raises(UserError, match="Row 2 of .* has no text in column 'prompt': mend or remove the row"):
            column(read_prompts(write), "prompt", write)


# Errors --------------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tokenizer, tmp_path):
    assert "'no.json' does not exist: check the path" in error_of(tokenizer, "no.json")
    for kind, content, words in (
        ("broken.json", '[{"prompt": ', "is not valid JSON"),
        ("lines.json", '{"a": 1}\n{"a": 2}\n', "one row a line is called .jsonl"),
        ("object.json", '{"data": []}', "holds one JSON dict"),
        ("open.csv", 'prompt,response\n"Hi,Hello.\n', "is not valid CSV (line 2: "),
        ("stray.csv", 'prompt,response\n"Hi" you,Hello.\n', "is not valid CSV (line 2: "),
    ):
        (tmp_path / kind).write_text(content)
        message = error_of(tokenizer, tmp_path / kind)
        assert words in message and str(tmp_path / kind) in message
    for kind in ("cut.jsonl.gz", "no.jsonl.gz", "no.parquet", "no.parquet.gz"):
        content = gzip.compress(b'{"prompt": "Hi", "response": "Hello."}\n' * 99)[:60] if "cut" in kind else b"no"
        (tmp_path / kind).write_bytes(gzip.compress(content) if kind == "no.parquet.gz" else content)
        message = error_of(tokenizer, tmp_path / kind)
        assert f"'{tmp_path / kind}' " in message and ("cannot be read" in message or "no valid Parquet" in message)
    for kind in ("latin.json", "latin.jsonl", "latin.csv"):
        (tmp_path / kind).write_bytes('prompt,response\n"Grüße","ä"\n'.encode("latin-1"))
        assert "cannot be read as UTF-8" in error_of(tokenizer, tmp_path / kind)


def test_json_that_is_called_jsonl(tokenizer, tmp_path):
    row = {"prompt": "Hi", "response": "Hello."}
    path = tmp_path / "rows.jsonl"
    for text in (
        json.dumps([row], indent=2), json.dumps([row] * 2), json.dumps(row, indent=2),
        "\n" + json.dumps(row, indent=2) + "\n" + json.dumps(row, indent=2),
    ):  # fmt: skip
        path.write_text(text)
        message = error_of(tokenizer, path)
        assert message.startswith(f"'{path}' holds JSON that is no row a line") and "is called .json;" in message


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_empty_files(tokenizer, tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    path.write_text("[]" if kind == "json" else "prompt,response\n" if kind == "csv" else "")
    assert error_of(tokenizer, path) == f"'{path}' holds no rows: give a data set with at least one."
    assert "No row can be trained on" in error_of(tokenizer, path, columns={"prompt": "a", "response": "b"})


def test_data_sets_that_cannot_be_loaded(tokenizer, tmp_path, datasets_cache):
    message = error_of(tokenizer, "nobody/nothing")
    assert "'nobody/nothing' (split 'train') could not be loaded" in message
    source = write(tmp_path, "hub", [{"prompt": "Hi", "response": "Hello."}])
    assert "(split 'validation') could not be loaded" in error_of(tokenizer, source, split="validation")


def test_columns_that_are_not_there(tokenizer, tmp_path):
    source = write_json(tmp_path / "rows.json", [{"ask": "Hi", "reply": "Hello."}])
    unknown = error_of(tokenizer, source)
    assert "has the columns ask, reply" in unknown and "dataset.columns.prompt" in unknown
    columns = {"prompt": "ask", "response": "replly"}
    assert "'replly' is no column of" in error_of(tokenizer, source, columns=columns)
    assert "did you mean 'reply'?" in error_of(tokenizer, source, columns=columns)
    message = error_of(tokenizer, source, columns={"prompt": "ask", "reponse": "reply"})
    assert "Unknown key 'reponse' in section 'dataset.columns'; did you mean 'response'?" in message
    for columns in ({"prompt": "ask"}, {"response": "reply"}, {"system": "ask"}):
        assert "must name 'messages', or both 'prompt' and 'response'" in error_of(tokenizer, source, columns=columns)
    (tmp_path / "broken.jsonl").write_text("no\nrows\n")
    assert "has the columns (none)" in error_of(tokenizer, tmp_path / "broken.jsonl")


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ({"source": "a.json", "fracton": 0.1}, "'fracton' in section 'dataset.mix'; did you mean 'fraction'?"),
        ({"source": "a.json"}, "'dataset.mix' needs a source and a fraction"),
        ({"fraction": 0.1}, "'dataset.mix' needs a source and a fraction"),
        ({"source": "a.json", "fraction": 1.0}, "dataset.mix.fraction is 1.0"),
        ({"source": "a.json", "fraction": -0.1}, "dataset.mix.fraction is -0.1"),
        ({"source": "a.json", "fraction": 10}, "dataset.mix.fraction is 10"),
        ({"source": "a.json", "fraction": "a tenth"}, "dataset.mix.fraction is a tenth"),
        ({"source": "a.json", "fraction": float("nan")}, "dataset.mix.fraction is nan"),
        ({"source": "a.json", "fraction": True}, "dataset.mix.fraction is True"),
        ({"source": "a.json", "fraction": 0.5}, "'a.json' does not exist"),
        ({"source": "a.json", "fraction": 0.5, "ce_weight": -1}, "dataset.mix.ce_weight is -1; it is a factor from 0"),
        ({"source": "a.json", "fraction": 0.5, "ce_weight": "0"}, "dataset.mix.ce_weight is 0; it is a factor from 0"),
        (
            {"source": "a.json", "fraction": 0.5, "constraint_weight": float("nan")},
            "dataset.mix.constraint_weight is nan",
        ),
        (
            {"source": "a.json", "fraction": 0.5, "ce_weight": 0, "constraint_weight": 0},
            "Both weights of 'dataset.mix' are 0",
        ),
        (
            [{"source": "a.json", "fraction": 0.5}, {"source": "b.json"}],
            "'dataset.mix[1]' needs a source and a fraction",
        ),
        ([{"source": "a.json", "fraction": 0.5}] * 2, "fractions of dataset.mix add up to 1;"),
        (["a.json"], "Section 'dataset.mix[0]' is 'a.json'; it is a mapping"),
    ],
)
def test_mixes_that_make_no_sense(tokenizer, two_sources, mix, words):
    assert words in error_of(tokenizer, two_sources[1], n=10, mix=mix)


def test_a_second_source_of_too_few_rows(tokenizer, two_sources):
    task, other = two_sources
    message = error_of(tokenizer, task, n=5200, mix={"source": other, "fraction": 0.25})
    assert message.startswith(f"1300 rows of '{other}' are asked for, but only 520 are usable")


@pytest.mark.parametrize("key", ["n", "max_seq_len"])
@pytest.mark.parametrize("value", [0, -5, 2.5, "100"])
def test_counts_that_make_no_sense(tokenizer, two_sources, key, value):
    assert f"dataset.{key} is {value!r}; it must be a whole number" in error_of(
        tokenizer, two_sources[1], **{key: value}
    )

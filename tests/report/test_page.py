import json
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from random import Random
from types import SimpleNamespace

import drawing
import pytest
from nasty import NASTY

from minisr import InputError
from minisr.cli import main
from minisr.evaluate import judge_metrics, win_rates
from minisr.report import chart_data, figures, markup, run_charts
from minisr.report.experiment_table import COLUMNS, differences_table, results_table
from minisr.report.page import write_page
from minisr.report.seed_statistics import mean_and_interval, over_seeds
from minisr.runner.config import Config, load_config, to_toml
from minisr.runner.evaluation import answer_metrics, histogram
from minisr.runner.files import read_json, read_jsonl, write_json
from minisr.worlds.tiny import oracle

pytest.importorskip("matplotlib")

MODELS = ("SFT", "M1", "M2", "M3")
PROMPTS = ["Write a story about a sad pig at the river.", "Write a story about a shy fox at the temple.",
           "Plan a day with the girl, a basket and the cliff."]
HOSTILE = ["<script>alert(1)</script>", "</pre></p></div></main></body></html>", "<!-- <![CDATA[ ]]> -->",
           "\" onload=\"x' onmouseover='y", "&lt;&amp;&#0;", "\u202eright\u202c שלום مرحبا 漢字",
           "</style></svg><img src=x onerror=y>", "<h2>Results</h2>", "\ud800 alone", "\x00\x1b[31m\r\x85"]


def write_jsonl(path, records):
    """With escapes, so that half a surrogate pair can be written."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def answers(name, hostile, scored):
    """Held-out answers, the later the model the more of them flawless; or hostile ones."""
    rng, records = Random(name), []
    for i, prompt in enumerate(PROMPTS * 4):
        good = rng.random() < 0.2 + 0.25 * MODELS.index(name)
        text = "Once there was a pig. It felt sad. It slept by the river. The end." if good else \
            "Once there was a pig." + " The end." * rng.randint(0, 3)
        if hostile:
            text = hostile[i % len(hostile)]
        records.append({"prompt": prompt, "sampled": text, "greedy": text + "!"})
        if scored:
            request = oracle.parse_request(prompt)
            records[-1] |= {f"{way}_points": oracle.examine(request, records[-1][way]).points
                            for way in ("sampled", "greedy")}
    return records


def judged(name):
    """Ranked responses with a model's rewards; the first response of every other prompt is unparsed."""
    rng = Random(f"judge {name}")
    return [{"prompt": prompt, "responses": list("abc"), "scores": [1, 3, 5],
             "rewards": [None if i % 2 else 2.5, float(rng.randint(0, 5)), 4.5],
             "given": [[2, 3], [3], [4, None]], "judgements": [["x"]] * 3}
            for i, prompt in enumerate(PROMPTS * 2)]


def iteration(folder, hostile):
    """What M1 or M2 makes: of the second prompt equally good responses; every fourth is cut off."""
    texts = [hostile[i::3] or ["same"] for i in range(3)]
    write_jsonl(folder / "responses.jsonl", [
        {"prompt": x, "responses": [text[0], "worse", "same", *text[1:], "cut"],
         "finished": [True] * (2 + len(text)) + [False]} for x, text in zip(PROMPTS, texts)])
    rewards = [[row[0], row[1], row[2], *[2.0] * (len(text) - 1), None] for row, text in
               zip(([3.0, 1.0, 5.0], [4.0] * 3, [5.0, 4.0, 4.5]), texts)]
    write_jsonl(folder / "rewards.jsonl", [
        {"prompt": x, "rewards": row, "scores": [[None, r] for r in row],
         "judgements": [["unreadable", text[0] if hostile else f"Score: {r}"] for r in row]}
        for x, row, text in zip(PROMPTS, rewards, texts)])
    write_jsonl(folder / "pairs.jsonl", [
        {"prompt": PROMPTS[0], "chosen": "same", "rejected": "worse", "chosen_reward": 5.0,
         "rejected_reward": 1.0},
        {"prompt": PROMPTS[2], "chosen": texts[2][0], "rejected": "of M1", "chosen_reward": 5.0,
         "rejected_reward": 2.0}])
    for name, counts in (("pairs", {"pairs": 2, "unread": 0, "tie": 1, "identical": 0}),
                         ("prompts", {"accepted": 3, "similar": 4, "cut off": 1}),
                         ("rewards", {"1": 1, "3.5": 2, "4": 3, "5": 2, "unread": 2})):
        write_json(folder / f"{name}.counts.json", counts)


def make_run(folder, source="world", models=MODELS, hostile=(), seconds=1.0):
    """The files of a run that a page is made of."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("")
    config = load_config(folder / "config.toml",
                         overrides=(f"seed_data.source={source}", "judge.judgements=2"))
    (folder / "config.toml").write_text(to_toml(config))
    made, metrics, scored = {}, {}, source == "world"
    for i, name in enumerate(models):
        made[name], ranked = answers(name, hostile, scored), judged(name)
        write_jsonl(folder / name / "answers.jsonl", made[name])
        write_jsonl(folder / name / "judge_evaluation.jsonl", ranked)
        write_json(folder / name / "meta.json", {"minisr": "0.1.0", "torch": "2"})
        write_jsonl(folder / name / "train_log.jsonl", [
            {"step": k, "loss": 1.0} | ({"dpo_loss": 0.7 - k / 99, "margin": k / 9, "accuracy": 0.5}
                                        if i > 1 else {}) for k in range(30)])
        m = metrics[name] = answer_metrics(made[name])
        for label, other in (("sft", "SFT"), ("m1", "M1"), ("previous", models[i - 1])):
            if i > (label == "m1") and scored:
                m[f"versus_{label}"] = win_rates(*([sum(r["sampled_points"]) for r in made[who]]
                                                   for who in (name, other)))
        m["judge"] = {**judge_metrics([r["scores"] for r in ranked], [r["rewards"] for r in ranked]),
                      "parse_rate": 0.75, "histogram": histogram([1, 2, None])}
        m |= {"pairs": 0, "seconds": seconds}
        if name in ("M1", "M2"):
            iteration(folder / name, list(hostile))
    write_json(folder / "metrics.json", {"seed": 0, "models": metrics})
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its page."""
    folder = make_run(tmp_path_factory.mktemp("page") / "run")
    write_page(folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def no_drawing(monkeypatch):
    """Charts are replaced by their titles, for tests of everything else."""
    drawing.replace_by_titles(monkeypatch)


class Page(HTMLParser):
    """Parses a page strictly: every element is closed, by its own tag, and no id comes twice."""

    def __init__(self, content):
        super().__init__()
        self.open, self.ids, self.tags, self.texts, self.attributes = [], [], [], [], []
        self.feed(content)
        self.close()
        assert self.open == [] and len(self.ids) == len(set(self.ids))
        self.text = "".join(self.texts)
        self.titles = [value for name, value in self.attributes if name == "aria-label"]
        self.links = [value for name, value in self.attributes
                      if name in ("src", "href", "xlink:href") and not value.startswith("#")]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def shown(text):
    """How a text that people or models wrote is to be read on a page."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


TITLES = ["Flawless answers", "Mean score", "Head to head", "Failures by criterion", "Length of the answers",
          "The paper's five metrics", "Calibration", "Scores given in each iteration", "DPO loss",
          "DPO margin", "DPO accuracy", "Outcome of the prompts", "Rejected prompts"]


def test_a_page_is_well_formed_whole_in_itself_and_shows_everything(finished):
    parsed = read(finished / "report.html")
    assert parsed.titles == TITLES and parsed.tags.count("figcaption") == len(TITLES)
    assert {"script", "img", "link", "iframe"}.isdisjoint(parsed.tags) and parsed.links == []
    content = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)|@import", content)
    for words in (*MODELS, "judge.judgements: 3 -> 2", *PROMPTS, "3 of 5 points; missed: ", "PyTorch 2"):
        assert words in parsed.text
    assert "Unfinished" not in parsed.text


def test_the_table_is_the_one_that_ends_a_run_without_the_clock(finished):
    metrics = read_json(finished / "metrics.json", "metrics")["models"]
    cells = [re.findall("<td>(.*?)</td>", row) for row in markup.run_table(metrics).split("<tr>")[2:]]
    heads = re.findall("<th>(.*?)</th>", markup.run_table(metrics))
    assert [row[0] for row in cells] == list(MODELS) and all(len(row) == len(heads) for row in cells)
    at = {head: i for i, head in enumerate(heads)}
    for row, m in zip(cells, metrics.values()):
        low, high = (100 * end for end in m["flawless_ci95"])
        assert row[at["flawless % T=0.7 [95 %]"]] == f"{100 * m['flawless']:.0f} [{low:.0f}, {high:.0f}]"
        assert row[at["Spearman"]] == f"{m['judge']['spearman']:.2f}"
    assert "five-best" in heads and not any("sec" in head for head in heads)


def test_hostile_texts_are_shown_as_they_are_and_nothing_more(finished, no_drawing, tmp_path):
    parsed = read(write_page(make_run(tmp_path / "run", hostile=HOSTILE)))
    harmless = read(write_page(make_run(tmp_path / "harmless")))
    assert set(parsed.tags) == set(harmless.tags) and parsed.titles == TITLES
    assert {name for name, _ in parsed.attributes} == {name for name, _ in harmless.attributes}
    assert parsed.tags.count("h2") == harmless.tags.count("h2")
    for text in HOSTILE:  # of four models, and among the responses
        assert parsed.text.count(shown(text).replace("\ud800", "?")) >= 5


@pytest.mark.parametrize("text", [*NASTY, *HOSTILE])
def test_every_text_is_read_back_from_its_html(text):
    assert Page(markup.text(text)).text == shown(text)
    assert Page(f'<i title="{markup.text(text)}"></i>').attributes == [("title", shown(text))]


def test_a_long_text_is_cut_and_says_how_much_is_missing(no_drawing, tmp_path):
    path = write_page(make_run(tmp_path / "run", hostile=["<b>&" * 2500]))
    text = read(path).text
    assert "<b>&" * 150 + " … (9,400 more characters)" in text and "<b>&" * 151 not in text
    assert path.stat().st_size < 500_000
    assert Page(markup.text("x" * 600)).text == "x" * 600


def test_the_same_run_gives_the_same_bytes_elsewhere_and_at_another_speed(finished, tmp_path):
    import matplotlib
    make_run(tmp_path / "another name", seconds=77.0)
    with matplotlib.rc_context({"font.size": 30, "xtick.direction": "in", "axes.labelsize": 30}):
        again = write_page(tmp_path / "another name").read_bytes()
    assert again == (finished / "report.html").read_bytes()
    assert matplotlib.rcParams["font.size"] != figures.STYLE["font.size"]  # nobody else's pictures change


@pytest.mark.parametrize("models, kept", [
    (0, ()), (1, ()), (2, ("responses",)), (2, ("responses", "rewards")),
    (3, ("responses", "rewards", "pairs"))])
def test_an_unfinished_run_shows_what_is_there(models, kept, no_drawing, tmp_path):
    folder = make_run(tmp_path / "run", models=MODELS[:models])
    for path in folder.glob("M[12]/*"):
        if path.name.partition(".")[0] in {"prompts", "responses", "rewards", "pairs"} - set(kept):
            path.unlink()
    parsed = read(write_page(folder))
    assert f"Unfinished: {', '.join(MODELS[models:])} not evaluated yet." in parsed.text
    assert parsed.titles == [
        *([*TITLES[:2], *TITLES[2:3] * (models > 1), *TITLES[3:7]] if models else []),
        *TITLES[7:8] * ("rewards" in kept), *TITLES[8:11] * (models > 2), *TITLES[11:12] * ("pairs" in kept)]
    assert ("M1's iteration" in parsed.text) == ("responses" in kept)
    assert ("reward 5.00; scores: unparsed, 5" in parsed.text) == ("rewards" in kept)
    assert ("No pair." in parsed.text) == ("chosen" in parsed.text) == ("pairs" in kept)
    (folder / "metrics.json").unlink()
    assert "flawless" not in read(write_page(folder)).text.lower()


@pytest.mark.parametrize("name", ["SFT", "M2"])
def test_a_model_without_answers_counts_as_not_evaluated(name, no_drawing, tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / name / "answers.jsonl").unlink()
    assert f"Unfinished: {name} not evaluated yet." in read(write_page(folder)).text


def test_damaged_counts_are_named(no_drawing, tmp_path):
    folder = make_run(tmp_path / "run")
    write_json(folder / "M1/hashes.json", {"rewards.counts.json": "0" * 64})
    with pytest.raises(InputError, match=r"rewards\.counts\.json is not the file that minisr wrote"):
        write_page(folder)


def test_a_part_of_another_kind_is_named(no_drawing, tmp_path):
    folder = make_run(tmp_path / "run")
    write_json(folder / "metrics.json", {"seed": 0, "models": {"SFT": 1}})
    with pytest.raises(InputError, match=r"metrics\.json: SFT is not a JSON object"):
        write_page(folder)
    write_json(tmp_path / "results.json", {"base": []})
    with pytest.raises(InputError, match=r"results\.json: base is not a JSON object"):
        write_page(tmp_path)


def test_a_file_of_another_kind_is_named(no_drawing, tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.json").write_text("[]")
    with pytest.raises(InputError, match=r"metrics\.json is not a JSON object"):
        write_page(folder)


@pytest.mark.parametrize("key", ["chosen_reward", "rejected_reward"])
def test_a_pair_without_a_reward_is_named(key, no_drawing, tmp_path):
    folder = make_run(tmp_path / "run")
    path = folder / "M1/pairs.jsonl"
    pairs = read_jsonl(path, "pairs")
    del pairs[1][key]
    write_jsonl(path, pairs)
    with pytest.raises(InputError, match=rf"M1/pairs\.jsonl, line 2: '{key}' is missing.*restore it") as error:
        write_page(folder)
    assert "\n" not in str(error.value)


def test_a_run_without_an_oracle_has_no_points_and_no_wins(no_drawing, tmp_path):
    parsed = read(write_page(make_run(tmp_path / "run", source="english")))
    assert parsed.titles == TITLES[4:]
    assert "points" not in parsed.text and "seed data: english" in parsed.text
    assert "flawless" not in parsed.text and "pairwise" in parsed.text  # no empty columns


def test_responses_carry_their_reward_their_judgement_and_their_side_of_the_pair(finished):
    content = (finished / "report.html").read_text(encoding="utf-8")
    found = content[content.index("M1's iteration: responses, rewards, pairs</h2>"):]
    first, second, third = ([re.sub("<.*?>", " ", answer) for answer in part.split('class="answer"')[1:]]
                            for part in found.split('class="prompt"')[1:])
    assert ["chosen" in told for told in first] == [False, False, True, False]  # judged better than the first
    assert ["rejected" in told for told in first] == [False, True, False, False]
    assert "reward 5.00; scores: unparsed, 5" in first[2] and "Score: 5.0" in first[2]
    assert "unreadable" not in first[2] and "unreadable" in first[3]
    assert f"(true score {oracle.score(PROMPTS[0], 'worse')})" in first[1]
    assert "cut off; no reward" in first[3]
    assert "No pair." in second[-1] and "No pair." not in "".join(first + third)
    assert len(third) == 5 and "of M1" in third[4] and "rejected" in third[4]  # not among the four


# The numbers in the pictures.

def test_the_numbers_of_the_pictures_are_those_of_the_metrics(finished):
    metrics = read_json(finished / "metrics.json", "metrics")["models"]
    charts = {chart.title: chart.arguments for chart in run_charts.answer_charts(finished, metrics)}
    names, ways, *_ = charts["Flawless answers"]
    assert names == list(MODELS)
    assert ways == {"sampled": [(m["flawless"], *m["flawless_ci95"]) for m in metrics.values()],
                    "greedy": [(m["flawless_greedy"], *m["flawless_greedy_ci95"]) for m in metrics.values()]}
    assert charts["Mean score"][1]["greedy"][2] == (metrics["M2"]["mean_score_greedy"],
                                                    *metrics["M2"]["mean_score_greedy_ci95"])
    criteria, failed, *_ = charts["Failures by criterion"]
    assert criteria == list(oracle.CRITERIA)
    assert failed["M3"] == [(1 - share,) * 3 for share in metrics["M3"]["criteria"]]
    lengths = charts["Length of the answers"][1].popitem()[1]
    assert [mean for mean, _, _ in lengths] == pytest.approx([m["length"] for m in metrics.values()])
    judge = next(run_charts.judge_charts(finished, list(MODELS), metrics)).arguments[1]
    assert judge["M1"] == [chart_data.estimate(metrics["M1"], f"judge.{key}") for key in
                           ("pairwise", "five_best", "exact", "spearman", "kendall")]
    assert judge["M1"][0] == (metrics["M1"]["judge"]["pairwise"], *metrics["M1"]["judge"]["pairwise_ci95"])
    assert judge["M1"][1] is None or judge["M1"][1] == (metrics["M1"]["judge"]["five_best"],) * 3


def test_head_to_head_names_each_pair_of_models_once_with_its_rates_and_intervals(finished):
    metrics = read_json(finished / "metrics.json", "metrics")["models"]
    found = chart_data.comparisons(metrics)
    assert list(found) == ["M1 against SFT", "M2 against SFT", "M2 against M1", "M3 against SFT",
                           "M3 against M1", "M3 against M2"]
    assert found["M3 against M2"] == metrics["M3"]["versus_previous"]
    assert found["M3 against M1"] == metrics["M3"]["versus_m1"]
    assert found["M2 against SFT"] == metrics["M2"]["versus_sft"]
    bars, shares, _, marks = next(chart.arguments for chart in run_charts.answer_charts(finished, metrics)
                                  if chart.title == "Head to head")
    assert bars == list(found)
    rates = metrics["M3"]["versus_previous"]
    assert [(part, row[5]) for part, row in shares.items()] == [
        (part, rates[part]) for part in ("win", "tie", "lose")]
    losses = tuple(1 - value for value in (rates["lose"], *rates["lose_ci95"]))
    assert [mark for bar, mark in marks if bar == 5] == [(rates["win"], *rates["win_ci95"]), losses]


def test_calibration_groups_parsed_rewards_by_the_true_score():
    records = [{"scores": [1, 5, 1], "rewards": [2.0, 4.0, None]},
               {"scores": [1, 4.5], "rewards": [3.0, 0.0]}]
    assert chart_data.calibration(records) == [(1, 2.5, 2), (4.5, 0.0, 1), (5, 4.0, 1)]
    assert chart_data.calibration([]) == chart_data.calibration([{"scores": [1], "rewards": [None]}]) == []


def test_lengths_are_the_mean_and_the_middle_80_percent():
    assert chart_data.lengths([{"sampled": "x" * n} for n in (*range(1, 11), 22)]) == (7.0, 2.0, 10.0)


def test_scores_are_shares_of_all_judgements_by_whole_points():
    counts = {"0": 1, "4": 2, "4.5": 1, "5": 4, "unread": 2}
    assert chart_data.score_shares(counts) == [0.1, 0, 0, 0, 0.2, 0.5, 0.2]


def test_an_estimate_without_interval_is_a_point_and_without_value_none():
    m = {"length": 3.0, "judge": {"exact": None, "kendall": 0.5}, "win": 0.1, "win_ci95": [0.0, 0.2]}
    assert chart_data.estimate(m, "length") == (3.0,) * 3
    assert chart_data.estimate(m, "judge.kendall") == (0.5,) * 3
    assert chart_data.estimate(m, "win") == (0.1, 0.0, 0.2)
    assert chart_data.estimate(m, "judge.exact") is chart_data.estimate(m, "versus_m1.win") is None


def paths(svg, colour):
    """The numbers of every path of this fill."""
    return [[float(n) for n in re.findall(r"[0-9.]+", path)] for path in re.findall(
        rf'<path d="([^"]*)"[^>]*style="[^"]*fill: {colour}', svg.replace("\n", " "), re.IGNORECASE)]


def test_bars_are_as_long_as_their_shares():
    svg = figures.stacked("t", ["a", "b"], {"win": [0.2, 0.5], "tie": [0.4, 0.0], "lose": [0.4, 0.5]}, "x")
    ends = {k: [(min(p[::2]), max(p[::2])) for p in paths(svg, figures.PARTS[k])[:2]] for k in range(3)}
    zero, whole = ends[0][0][0], ends[2][0][1]
    share = {k: [tuple((x - zero) / (whole - zero) for x in bar) for bar in ends[k]] for k in ends}
    assert share[0] == [pytest.approx((0, 0.2)), pytest.approx((0, 0.5))]
    assert share[1][0] == pytest.approx((0.2, 0.6)) and share[2][1] == pytest.approx((0.5, 1.0))


def points(svg, model):
    """(x, y) of a model's points, without that of the legend."""
    point = r'<g clip-path="[^"]*">\s*<use [^>]*x="([0-9.]+)" y="([0-9.]+)" style="[^"]*'
    found = re.findall(point + figures.COLOURS[MODELS.index(model)], svg, re.IGNORECASE)
    return [tuple(map(float, at)) for at in found]


def test_points_lie_where_their_values_are_and_a_missing_one_is_left_out():
    models = {"M1": [(0.0, 0.0, 0.0), (0.25, 0.2, 0.3)], "M2": [(1.0, 1.0, 1.0), None]}
    svg = figures.rows("t", ["a", "b"], models, "x", True)
    [(zero, top), (quarter, bottom)], [(whole, between)] = points(svg, "M1"), points(svg, "M2")
    assert (quarter - zero) / (whole - zero) == pytest.approx(0.25, abs=1e-4) and top < between < bottom
    line = re.search(rf"M ([0-9.]+) {bottom}\s+L ([0-9.]+) {bottom}\s+\" clip-path=[^>]*#d55e00", svg)
    assert [(float(x) - zero) / (whole - zero) for x in line.groups()] == pytest.approx([0.2, 0.3], abs=1e-4)


def test_upright_points_lie_where_their_values_are():
    none, half, whole = (0.0, 0.0, 0.0), (0.5, 0.4, 0.6), (1.0, 1.0, 1.0)
    svg = figures.by_model("t", ["SFT", "M1", "M2"], {"a": [none, None, half], "b": [whole, half, half]},
                           "share", True)
    [(_, zero), (_, top)], [(_, one)], [(left, a), (right, b)] = (points(svg, name) for name in MODELS[:3])
    assert (zero - one) / (zero - top) == pytest.approx(0.5, abs=1e-4) and a == b == one and left < right
    line = re.search(rf'M {left} ([0-9.]+)\s+L {left} ([0-9.]+)\s+" clip-path=[^>]*#0072b2', svg)
    assert [(zero - float(y)) / (zero - top) for y in line.groups()] == pytest.approx([0.4, 0.6], abs=1e-4)


def test_scores_and_training_are_drawn_in_their_models_colours():
    bars = figures.histogram("t", ["0", "1"], {"M2": [0.2, 0.8]}, "x", "y")
    for svg in (bars, figures.curves("t", {"M2": [1.0, 0.5, 0.2]}, "x", 0.0),
                figures.calibration("t", {"M2": [(1, 2.0, 3)]}),
                figures.rows("t", ["a"], {"M2": [(1, 1, 1)]}, "x")):
        assert figures.COLOURS[2].lower() in svg and figures.COLOURS[1].lower() not in svg
    low, high = (max(p[1::2]) - min(p[1::2]) for p in paths(bars, figures.COLOURS[2])[:2])
    assert high / low == pytest.approx(4)


def test_a_picture_takes_any_name_and_every_number_of_models():
    svg = figures.rows("<t>", ["$x^$ <b>&", "_" * 50], {"M1": [(0.1,) * 3] * 2}, "</text>")
    assert "$x^$ &lt;b&gt;&amp;" in svg and "<b>" not in svg and "_" * 18 + "…<" in svg
    names = ["SFT", *(f"M{t}" for t in range(1, 30))]
    svg = figures.by_model("t", names, {"x": [(1.0, 1.0, 1.0)] * 30}, "y")
    assert ">SFT<" in svg and ">M4<" in svg and ">M1<" not in svg  # every fourth


# An experiment's page, and the command line.

RESULTS = {variant: {model: {figure: [0.1 + 0.01 * k * len(variant), 0.2] for _, figure, _ in COLUMNS}
                     | {"seed": [0, 2]} for k, model in enumerate(MODELS)} for variant in ("base", "random")}
RESULTS["random"]["M3"]["flawless"] = [0.1, None]
RESULTS["<b>|odd & 'name'"] = {"SFT": {"seed": [0, 2], "flawless": [0.5, 0.7]}}


@pytest.fixture
def experiment(finished, tmp_path):
    folder = tmp_path / "plan"
    for name, changes in (("base-0", ()), ("base-10", ()), ("base-2", ()),
                          ("random-0", ("judge.by=random",))):
        shutil.copytree(finished, folder / name)
        config = load_config(folder / name / "config.toml", overrides=changes)
        (folder / name / "config.toml").write_text(to_toml(config))
    (folder / "random-0" / "report.html").unlink()
    (folder / "base-2.log").write_text("no run")
    write_json(folder / "results.json", RESULTS)
    return folder


def test_an_experiments_page_has_the_table_the_pictures_and_links_to_its_runs(experiment):
    content = write_page(experiment).read_text(encoding="utf-8")
    parsed = Page(content)
    assert parsed.tags.count("svg") == 5 and parsed.text.count("minisr experiment plan") == 2
    assert parsed.links == [f"base-{seed}/report.html" for seed in (0, 2, 10)]
    assert "random judge.by: 'self' -> 'random'" in parsed.text and "<b>|odd & 'name'" in parsed.text
    cells = [[Page(cell).text for cell in re.findall("<td>(.*?)</td>", row)]
             for table in content.split("<table>")[1:] for row in table.split("<tr>")[2:]]
    known = {name: RESULTS[name] for name in ("base", "random")}
    assert cells[:7] == [line.strip("| ").split(" | ") for line in results_table(known).split("\n")[2:]]
    assert cells[7][:4] == ["<b>|odd & 'name'", "SFT", "60.0 ± 127.1", "-"]
    assert cells[8:] == [line.strip("| ").rsplit(" | ", len(COLUMNS))
                         for line in differences_table(RESULTS).split("\n")[2:]]
    assert len(cells) == 8 + 2 + 3 + 1 and cells[-1][0] == "<b>|odd & 'name' SFT - base SFT"
    assert write_page(experiment).read_text(encoding="utf-8") == content


def test_links_are_right_from_another_folder(experiment, no_drawing, tmp_path):
    (experiment / "base-0").rename(experiment / "base-0 #1")
    parsed = read(write_page(experiment, tmp_path / "else" / "where.html"))
    assert parsed.links == [f"../plan/base-{seed}/report.html" for seed in ("2", "10", "0%20%231")]


def test_the_estimates_of_an_experiment_are_means_over_seeds():
    points, seeds = over_seeds(RESULTS, "flawless")
    mean, half = mean_and_interval(RESULTS["random"]["M2"]["flawless"])
    assert points["M2"][1:] == [(mean, mean - half, mean + half), None]
    assert points["M3"][1] is None and points["M1"][2] is None and points["SFT"][2][0] == pytest.approx(0.6)
    assert seeds["M2"][:2] == [RESULTS["base"]["M2"]["flawless"], RESULTS["random"]["M2"]["flawless"]]
    assert over_seeds({"base": {"M1": {"versus_m1.win": [None, None]}}}, "versus_m1.win") == ({}, {})


def test_an_experiment_of_which_nothing_is_finished_has_a_page(no_drawing, tmp_path):
    write_json(tmp_path / "results.json", {})
    assert read(write_page(tmp_path)).tags.count("svg") == 0


def test_the_command_writes_the_page_to_the_given_file(copy, no_drawing, tmp_path, capsys):
    assert main(["report", str(copy)]) == 0
    assert capsys.readouterr().out.startswith(str(copy / "report.html"))
    assert main(["report", str(copy), "--out", str(tmp_path / "a/b.html")]) == 0
    assert (tmp_path / "a/b.html").read_bytes() == (copy / "report.html").read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_is_neither_a_run_nor_an_experiment_is_refused(no_drawing, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        assert main(["report", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"minisr: {folder} holds no run") and err.count("\n") == 1 and out == ""
    with pytest.raises(InputError, match="config"):
        (tmp_path / "config.toml").write_text("nonsense = 1")
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.fixture
def short_run(monkeypatch, copy):
    """minisr run on a folder in which all is made already."""
    run = SimpleNamespace(folder=copy, has_oracle=True, config=Config(), dtype=None, device="cpu")
    monkeypatch.setattr("minisr.cli._open_run", lambda options: run)
    metrics = read_json(copy / "metrics.json", "metrics")
    monkeypatch.setattr("minisr.runner.steps.run_loop", lambda run, on_evaluated: metrics)
    return ["run", "any.toml"]


def test_a_run_and_an_experiment_end_with_their_page(
        short_run, copy, experiment, no_drawing, monkeypatch, capsys):
    (copy / "report.html").unlink()
    assert main(short_run) == 0 and f"Page: {copy / 'report.html'}\n" in capsys.readouterr().out
    assert read(copy / "report.html").titles == TITLES
    known = {name: RESULTS[name] for name in ("base", "random")}
    monkeypatch.setattr("minisr.runner.experiment.experiment", lambda *_: known)
    assert main(["experiment", "any.toml", "--out", str(experiment)]) == 0
    assert f"Page: {experiment / 'report.html'}\n" in capsys.readouterr().out


def test_a_run_without_an_oracle_ends_with_answers_to_read(
        short_run, copy, no_drawing, monkeypatch, capsys):
    run = SimpleNamespace(folder=copy, has_oracle=False, config=Config(), dtype=None, device="cpu")
    monkeypatch.setattr("minisr.cli._open_run", lambda options: run)
    assert main(short_run) == 0
    out = capsys.readouterr().out.partition("This data has no oracle, so answers are not scored.")[2]
    answers = read_jsonl(copy / "M2/answers.jsonl", "answers")
    assert [record["sampled"] in out for record in answers[:2]] == [True, True] and out.count("x    ") == 2


def test_without_matplotlib_the_command_names_the_extra_and_a_run_says_how(
        short_run, copy, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    (copy / "report.html").unlink(missing_ok=True)
    assert main(["report", str(copy)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and 'pip install "minisr[report]"' in err and "matplotlib" in err
    assert main(short_run) == 0
    told = [line for line in capsys.readouterr().out.split("\n") if "minisr[report]" in line]
    assert told == ['No page: pip install "minisr[report]" (from a checkout: pip install ".[report]"), then minisr '
                    f"report {copy}"]
    assert not (copy / "report.html").exists()


# In a browser.

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<!doctype html><meta charset="utf-8"><style>iframe{border:0;height:9000px}</style>
FRAMES<script>addEventListener("load", () => {
  const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1;
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const d = frame.contentDocument, view = frame.contentWindow, all = [...d.querySelectorAll("body *")];
    const labels = [...d.querySelectorAll("svg text")].map(t => [t, t.ownerSVGElement]);
    return {width: view.innerWidth, scroll: d.scrollingElement.scrollWidth, all: all.length,
      wide: all.filter(e => !e.closest(".scroll table"))
               .filter(e => e.getBoundingClientRect().right > view.innerWidth + 0.5)
               .map(e => e.tagName + e.className).slice(0, 5),
      broken: [...d.images].filter(i => !i.naturalWidth).length, labels: labels.length,
      cut: labels.filter(([t, s]) => !inside(t.getBoundingClientRect(), s.getBoundingClientRect()))
                 .map(([t]) => t.textContent),
      smallest: Math.min(...labels.map(([t, s]) => parseFloat(view.getComputedStyle(t).fontSize)
                * s.getBoundingClientRect().width / s.viewBox.baseVal.width))}});
  document.body.textContent = "MEASURED" + JSON.stringify(found) + "END"})</script>"""


def measure(content, tmp_path):
    """What Chromium measures of a page in frames of a phone's and a desktop's width."""
    frames = "".join(f'<iframe style="width:{width}px" srcdoc="{escape(content)}"></iframe>'
                     for width in (390, 1280))
    (tmp_path / "measure.html").write_text(MEASURE.replace("FRAMES", frames), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1400,1000", "--dump-dom", (tmp_path / "measure.html").as_uri()],
        capture_output=True, text=True, encoding="utf-8", timeout=120)
    return json.loads(unescape(re.search("MEASURED(.*?)END", done.stdout, re.DOTALL)[1]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("kind", ["run", "hostile", "experiment"])
def test_nothing_is_wider_than_a_phone_or_a_desktop(kind, finished, experiment, tmp_path):
    if kind == "hostile":
        finished = make_run(tmp_path / "run", hostile=[*HOSTILE[:-2], "x" * 5000, "漢" * 5000])
    content = write_page(experiment if kind == "experiment" else finished).read_text(encoding="utf-8")
    phone, desktop = measure(content, tmp_path)
    assert (phone["width"], desktop["width"]) == (390, 1280) and phone["all"] == desktop["all"] > 500
    for seen in (phone, desktop):
        assert seen["scroll"] <= seen["width"] and seen["wide"] == [] and seen["broken"] == 0
        assert seen["labels"] > 50 and seen["cut"] == [] and seen["smallest"] >= 10

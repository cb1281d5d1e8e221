"""report.html: what it reads, what it shows, and the verdict of each failure mode on runs where the truth is known."""

import base64
import json
import re

import numpy as np
import pytest

from rlhf.reports import health, plots, report, runs


def write_run(folder, stage="ppo", rows=(), summary=None, samples=(), config=None):
    folder.mkdir(parents=True)
    run = {"stage": stage, "config": {"seed": 0} | (config or {}), "summary": summary or {}}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))


def ppo_rows(count=40, **last):
    """Rows of a healthy run; `last` overrides the value that a metric climbs to in a straight line."""
    first = {"objective/scores": 0.0, "objective/gold": 0.2, "objective/kl": 0.0, "policy/entropy_avg": 2.0}
    end = {"objective/scores": 2.0, "objective/gold": 1.0, "objective/kl": 6.0, "policy/entropy_avg": 1.5}
    first |= {"val/explained_variance": 0.5, "completions/mean_length": 20.0, "completions/clipped_ratio": 0.3}
    end |= {"val/explained_variance": 0.7, "completions/mean_length": 22.0, "completions/clipped_ratio": 0.1}
    end |= {key.replace("__", "/"): value for key, value in last.items()}
    return [
        {"step": i + 1, **{key: first[key] + (end[key] - first[key]) * i / (count - 1) for key in first}}
        for i in range(count)
    ]


def responses(slope=0.0, count=200, length=20, text="They went home."):
    rng = np.random.default_rng(0)
    lengths = rng.integers(length - 8, length + 9, count)
    scores = slope * (lengths - length) / 5 + rng.standard_normal(count)
    return [
        {"prompt": f"Tom number {i} saw a bird.", "completion": f" {text} {i}", "ended": True, "length": int(n)}
        | {"reward": float(s), "gold": float(s) / 2, "kl": 1.0}
        for i, (n, s) in enumerate(zip(lengths, scores, strict=True))
    ]


def pipeline_dir(folder, rows=None, evaluation=None, accuracy=0.7):
    keys = {"eval/accuracy": accuracy, "eval/longer_wins": 0.52, "eval/pairs": 400}
    for name, groups in (("k", ("4", "9")), ("gap", ("1", "2", "3")), ("labeler", ("<ann>", "bob"))):
        keys[f"eval/pairs_by_{name}"] = dict.fromkeys(groups, 100)
        keys[f"eval/accuracy_by_{name}"] = dict.fromkeys(groups, 0.68)
        keys[f"eval/longer_wins_by_{name}"] = dict.fromkeys(groups, 0.53)
    keys |= {"eval/accuracy_low": 0.65, "eval/accuracy_high": 0.74, "eval/length_correlation": -0.25}
    points = {"low": [0.4, 0.6], "high": [0.6, 0.8], "pairs": [300, 100]}
    keys["eval/calibration"] = {"predicted": [0.52, 0.8], "observed": [0.5, 0.7], **points}
    keys["eval/score_by_length"] = {"characters": [50, 90], "score": [-0.2, 0.2], "deviation": [1.0, 1.1]}
    write_run(folder / "sft", "sft", [{"step": i, "loss": 3 / i} for i in range(1, 9)], {"eval/loss": 1.2})
    write_run(folder / "reward", "reward", [{"step": i, "loss": 0.7, "accuracy": 0.5} for i in range(9)], keys)
    write_run(folder / "ppo", rows=rows or ppo_rows())
    write_run(folder / "ppo_ptx", rows=ppo_rows())
    table = [
        {"name": "base", "gold": 0.1, "win_rate": None, "lm_loss": 1.8, "kl": 2.0, "ends_properly": 0.05},
        {"name": "SFT", "gold": 0.3, "win_rate": None, "lm_loss": 1.9, "kl": 0.0, "ends_properly": 0.8},
        {"name": "PPO", "gold": 0.9, "win_rate": {"rate": 0.8, "low": 0.74, "high": 0.85}, "lm_loss": 2.2, "kl": 6.0},
        {
            "name": "PPO-ptx",
            "gold": 0.8,
            "win_rate": {"rate": 0.75, "low": 0.7, "high": 0.8},
            "lm_loss": 1.98,
            "kl": 5.0,
        },
    ]
    found = {"title": "a <b>run</b>", "policies": table, "labeler": {"ceiling": 0.84}, "note": "100 prompts"}
    found["responses"] = {row["name"]: responses() for row in table}
    (folder / "evaluation.json").write_text(json.dumps({**found, **(evaluation or {})}))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = pipeline_dir(tmp_path_factory.mktemp("report") / "run")
    path = report.write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_report_needs_nothing_outside_itself(page):
    assert page.startswith("<!doctype html>") and "name=viewport" in page
    sources = re.findall(r"src='([^']{0,40})", page)
    assert len(sources) >= 12 and all(s.startswith("data:image/svg+xml;base64,") for s in sources)
    assert not re.search(r"(href|src)=['\"]?http|@import|url\(", page)
    first = re.search(r"base64,([^']+)'", page)[1]
    assert b"<svg" in base64.b64decode(first)
    assert len(page) < 3_000_000


def test_report_shows_the_table_first_then_health_plots_and_samples(page):
    places = [
        page.index(f"<h2>{title}</h2>") for title in ("Result", "Health", "Plots", "The same prompts, every policy")
    ]
    assert places == sorted(places)
    assert "<td>80 %<br><small>74–85</small></td>" in page
    assert page.count("They went home. 0") == 4  # the first prompt, once for each policy
    assert "<th scope=row>labeler &lt;ann&gt;</th><td>100</td><td>0.680</td><td>0.530</td>" in page
    assert "<th scope=row>ranks 3 apart</th>" in page and "Correlation over all responses: −0.25." in page
    for title in (
        "Win rate over SFT",
        "Alignment tax",
        "Score in PPO",
        "Score against distance from SFT",
        "KL from SFT",
        "Entropy of the policy",
        "Response length",
        "What the value function explains",
        "Reward model: right on held-out pairs",
        "Reward model: near and far pairs",
        "Reward model: calibration",
        "Reward model: score against length",
        "Reward against length",
        "SFT: loss",
        "Reward model: loss",
    ):
        assert f"<h3>{title}</h3>" in page, title


def test_report_escapes_what_models_write(tmp_path):
    assert "a &lt;b&gt;run&lt;/b&gt;" in report.write_report(pipeline_dir(tmp_path / "run")).read_text(encoding="utf-8")
    write_run(
        tmp_path / "one",
        rows=ppo_rows(),
        samples=[{"step": 1, "prompt": "<script>", "completion": "</p><script>alert(1)</script>", "score": 1.0}],
    )
    page = report.write_report(tmp_path / "one").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page


ENGINE = {"gap (nats)": "logprob_gap_mean", "ESS (share)": "effective_sample_size"}


def engine_rows(count=12):
    """Each number another one, so that a mix-up shows."""
    names = ("logprob_gap_mean", "effective_sample_size", "truncated_fraction", "filtered_fraction")
    extra = [{f"rollout/{name}": 0.1 * k + 0.001 * i for k, name in enumerate(names)} for i in range(count)]
    return [row | more for row, more in zip(ppo_rows(count), extra, strict=True)]


@pytest.mark.parametrize("kind, share", [("token_truncate", "truncated"), ("sequence_mask", "filtered")])
def test_samples_of_an_engine_have_their_figure(tmp_path, monkeypatch, kind, share):
    write_run(tmp_path / "run", rows=engine_rows(), config={"rollout_correction": kind})
    drawn, original = [], plots.lines
    monkeypatch.setattr(plots, "lines", lambda panels, **text: (drawn.append(panels), original(panels, **text))[1])
    page = report.write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<h3>Samples of the rollout engine</h3>" in page and "so much of the batch would say as much" in page
    (panels,) = [dict(panels) for panels in drawn if "ESS (share)" in dict(panels)]
    wanted = ENGINE | {"clipped (share)": f"{share}_fraction"}
    assert {label: named["PPO"] for label, named in panels.items()} == {
        label: (list(range(1, 13)), [row[f"rollout/{name}"] for row in engine_rows()]) for label, name in wanted.items()
    }


def test_samples_drawn_ahead_have_their_figure(tmp_path, monkeypatch):
    more = [{"rollout/seconds_waited": 0.5 * i, "rollout/seconds_sampled": 9.0 + i} for i in range(5)]
    rows = [row | times for row, times in zip(ppo_rows(5), more, strict=True)]
    write_run(tmp_path / "run", rows=rows)
    drawn, original = [], plots.lines
    monkeypatch.setattr(plots, "lines", lambda panels, **text: (drawn.append(panels), original(panels, **text))[1])
    page = report.write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<h3>Samples drawn ahead</h3>" in page and "<h3>Samples of the rollout engine</h3>" not in page
    (panel,) = [named for panels in drawn for label, named in panels if label == "seconds"]
    steps = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert panel == {"waited": (steps, [0, 0.5, 1, 1.5, 2]), "sampled": (steps, [9, 10, 11, 12, 13])}


def test_a_run_without_an_engine_has_no_such_figure(page):
    assert "rollout engine" not in page and "drawn ahead" not in page


def verdict(folder, check, **options):
    return check(runs.read_report(pipeline_dir(folder, **options)))


def test_a_healthy_run_raises_no_alarm(tmp_path):
    checks = health.health(runs.read_report(pipeline_dir(tmp_path / "run")))
    assert len(checks) == 10
    assert [c.name for c in checks if c.verdict == "bad"] == []
    assert sum(c.verdict == "good" for c in checks) >= 7


@pytest.mark.parametrize(
    ("check", "last", "number"),
    [
        (health.reward_hacking, {"objective__gold": -0.5}, "gold −0.6"),
        (health.kl_runaway, {"objective__kl": 60.0}, "57.7 nats"),
        (health.no_movement, {"objective__kl": 0.01, "objective__scores": -0.1}, "0.01 nats"),
        (health.value_function, {"val__explained_variance": -0.6}, "PPO: −0."),
        (health.entropy_collapse, {"policy__entropy_avg": 0.1}, "→ 0.1"),
    ],
)
def test_each_failure_is_named(tmp_path, check, last, number):
    found = verdict(tmp_path / "bad", check, rows=ppo_rows(**last))
    assert found.verdict == "bad" and number in found.number, found
    assert verdict(tmp_path / "good", check).verdict == "good"


def test_reward_hacking_that_has_only_begun_is_watched(tmp_path):
    rows = ppo_rows()
    for i, row in enumerate(rows):
        row["objective/gold"] = 0.2 + 0.04 * min(i, 20) - 0.02 * max(0, i - 20)
    assert verdict(tmp_path / "run", health.reward_hacking, rows=rows).verdict == "watch"


def test_length_bias_is_a_correlation(tmp_path):
    names = ("base", "SFT", "PPO", "PPO-ptx")
    biased = {"responses": {name: responses(slope=2.0) for name in names}}
    found = verdict(tmp_path / "run", health.length_bias, evaluation=biased)
    assert found.verdict == "bad" and "r = +0.89" in found.number
    longer = {"responses": {name: responses(length=20 if name == "SFT" else 40) for name in names}}
    assert "length 1.97" in verdict(tmp_path / "longer", health.length_bias, evaluation=longer).number


def test_echoing_the_prompt_is_seen(tmp_path):
    names = ("base", "SFT", "PPO", "PPO-ptx")
    echoing = {n: responses(text="Number number bird." if n == "PPO" else "They went home.") for n in names}
    found = verdict(tmp_path / "run", health.sycophancy, evaluation={"responses": echoing})
    assert found.verdict == "bad" and "PPO: 100 % of words (SFT 0 %)" in found.number
    assert health.echo("The cat sat.", "Then dogs came.") == 0.0
    assert health.echo("The cat sat.", "it is") is None


def test_alignment_tax_and_what_ptx_gives_back(tmp_path):
    found = verdict(tmp_path / "run", health.alignment_tax)
    assert found.number == "PPO: +0.300 nats a token; PPO-ptx: +0.080 nats a token (73 % given back)"
    assert found.verdict == "watch"


def test_reward_model_must_beat_the_length_rule(tmp_path):
    assert verdict(tmp_path / "good", health.reward_model).verdict == "good"
    assert verdict(tmp_path / "bad", health.reward_model, accuracy=0.51).verdict == "bad"


def test_text_table_lines_up_and_leaves_out_what_was_not_measured():
    rows = [
        {"name": "SFT", "gold": 0.5, "win_rate": None, "kl": -1e-9, "lm_loss": None},
        {
            "name": "PPO",
            "gold": 1.25,
            "win_rate": {"rate": 0.801, "low": 0.75, "high": 0.84},
            "kl": 7.5,
            "lm_loss": None,
        },
    ]
    lines = report.text_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "LM loss" not in lines[0] and "Mean length" not in lines[0]
    assert lines[2].split() == ["SFT", "0.50", "–", "0.00"]
    assert lines[3].split() == ["PPO", "1.25", "80", "%", "(75–84)", "7.50"]


def test_reward_figures_without_data_are_left_out():
    bars = {"x": "K", "title": "t", "caption": "c"}
    assert plots.accuracy_bars([], **bars) is None
    assert plots.accuracy_bars([("all", float("nan"), None)], **bars) is None
    assert plots.accuracy_bars([("all", 0.7, None)], **bars).title == "t"
    assert plots.calibration_curve([]) is None and plots.score_by_length([(10.0, 0.1, 1.0)]) is None


def test_report_of_a_running_stage(tmp_path, capsys):
    """A log whose last line is half written is read up to there; a broken line inside is an error that says where."""
    write_run(tmp_path / "run", rows=ppo_rows(3))
    with open(tmp_path / "run/metrics.jsonl", "a") as log:
        log.write('{"step": 4, "objec')
    assert report.main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run/report.html")
    with open(tmp_path / "run/metrics.jsonl", "a") as log:
        log.write('\n{"step": 5}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:4: not a line of JSON"):
        report.write_report(tmp_path / "run")


@pytest.mark.parametrize("rows", [[], [{"step": 1, "objective/kl": None}], [{"step": 1, "objective/kl": 1.0}]])
def test_report_of_a_stage_that_has_hardly_begun(tmp_path, rows):
    write_run(tmp_path / "run", rows=rows)
    assert "<h2>Configuration</h2>" in report.write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="which does not exist"):
        report.write_report(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no run: neither .*run\.json nor a stage's folder"):
        report.write_report(tmp_path / "empty")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "none")])


def test_lines_of_a_log_end_at_a_line_feed(tmp_path):
    """Other marks that Python takes for line ends stand in people's texts."""
    write_run(tmp_path / "run", rows=ppo_rows(3))
    rows = [{"step": 1, "prompt": "a\u2028b", "completion": "c\x85d\u2029", "score": 1.0}] * 3
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "run" / "samples.jsonl").write_text(text, encoding="utf-8")
    assert runs.read_report(tmp_path / "run").runs["PPO"].samples == rows
    assert report.write_report(tmp_path / "run").is_file()


def test_prompts_that_are_messages(tmp_path):
    """As older runs wrote them."""
    talk = [{"role": "system", "content": "be good"}, {"role": "user", "content": "the dog"}]
    samples = [{"step": i, "prompt": talk, "completion": "ran", "score": 1.0} for i in range(30)]
    write_run(tmp_path / "run", rows=ppo_rows(), samples=samples)
    assert (
        "<blockquote>system: be good\nuser: the dog</blockquote>" in report.write_report(tmp_path / "run").read_text()
    )


def test_a_long_run_has_a_short_report(tmp_path):
    """Ten times as many iterations and samples: the same size."""
    sizes = []
    for count in (3_000, 30_000):
        samples = [{"step": i, "prompt": "a", "completion": "b " * (i % 9), "score": i % 7} for i in range(count)]
        write_run(tmp_path / str(count), rows=ppo_rows(count), samples=samples)
        sizes.append(report.write_report(tmp_path / str(count)).stat().st_size)
    assert sizes[1] < 1.2 * sizes[0] and sizes[1] < 1_500_000


def test_a_thinned_curve_keeps_its_peaks():
    x, y = list(range(50_000)), [0.0] * 50_000
    y[31_234], y[31_300] = 5.0, -7.0
    found = list(zip(*plots.extremes(x, y)))
    assert len(found) <= plots.MOST_POINTS and (31_234, 5.0) in found and (31_300, -7.0) in found
    assert [place for place, _ in found] == sorted(place for place, _ in found)
    assert plots.extremes([1, 2], [3, 4]) == ([1, 2], [3, 4])
    v = np.arange(100.0 * plots.MOST_POINTS)
    assert plots.means(v).tolist() == (100 * np.arange(plots.MOST_POINTS) + 49.5).tolist()
    assert len(plots.every(v)) <= plots.MOST_POINTS and not len(plots.every([]))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("run.json", "[]", "run.json: holds a list, wants a JSON object"),
        ("run.json", "{", "run.json: not JSON"),
        ("evaluation.json", "[]", "evaluation.json: holds a list, wants a JSON object"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl:1: lacks step"),
        ("samples.jsonl", '{"step": 1}\n', "samples.jsonl:1: lacks prompt, completion"),
    ],
)
def test_files_that_no_run_wrote_are_named(tmp_path, file, content, said):
    write_run(tmp_path / "run", rows=ppo_rows(3))
    (tmp_path / "run" / file).write_text(content)
    with pytest.raises(ValueError, match=said):
        report.write_report(tmp_path / "run")

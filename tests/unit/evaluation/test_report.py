"""Reports of one run and of several compared."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from svd_ds.evaluation import fixed_set
from svd_ds.evaluation.charts import smoothed
from svd_ds.evaluation.report import write_report
from svd_ds.evaluation.runs import read_run, split_common_prefix
from svd_ds.video import contact_sheet, write_mp4

SIGMAS = [0.01, 1.0, 100.0]


def evaluation(step: int, losses: list[float], name: str = "set") -> dict[str, object]:
    return {
        "step": step,
        "samples": 8 * step,
        "set": name,
        "clips": 4,
        "sigma": SIGMAS,
        "loss": [loss + 0.1 for loss in losses],
        "loss_average": losses,
        "grad_norm": [0.1, 1.0, 0.1],
        "loss_by_frame": [0.5, 0.6],
        "grad_norm_by_frame": [0.3, 0.2],
    }


def fake_run(
    path: Path,
    lr: float,
    num_steps: int = 30,
    sampled: tuple[int, ...] = (10, 30),
    evaluations: tuple[dict[str, object], ...] = (),
) -> Path:
    path.mkdir(parents=True)
    config = {"optim": {"lr": lr, "betas": [0.9, 0.999]}, "model": {"heads": None}, "note": "<b>bold</b>"}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {
            "step": s,
            "samples": 8 * s,
            "loss": math.exp(-s / 4),
            "lr": lr,
            "clips_per_s": 4.0,
            "step_s": 130.0,
            "new": [s],
        }
        for s in range(1, num_steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluations:
        (path / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    frames = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    for step in sampled:
        folder = path / "samples" / f"step-{step:07d}"
        write_mp4(frames, folder / "video-0.mp4", 6)
        contact_sheet([frames], folder / "contact_sheet.png")
    return path


class Outline(HTMLParser):
    """HTML tags with their attributes; fails if a tag is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def sources(self, tag: str) -> list[str]:
        return [attributes["src"] or "" for name, attributes in self.tags if name == tag]


def report(tmp_path: Path, *runs: Path) -> tuple[str, Outline]:
    write_report(list(runs), tmp_path / "out" / "report.html")
    html = (tmp_path / "out" / "report.html").read_text()
    outline = Outline(html)
    assert not outline.open
    return html, outline


def test_report_of_one_run_is_one_file(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "small", 1e-4)
    html, outline = report(tmp_path, run)
    assert html.count("<svg") == 3  # loss, lr, clips per second: this run has no gradient norm
    assert "small" in html and "optim.betas" in html and "[0.9, 0.999]" in html and "1 h 05 min" in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html and "<b>bold" not in html
    assert html.index("Step 30") < html.index("Step 10")
    mp4 = (run / "samples" / "step-0000030" / "video-0.mp4").read_bytes()
    assert outline.sources("video")[0] == "data:video/mp4;base64," + base64.b64encode(mp4).decode()
    assert len(outline.sources("video")) == len(outline.sources("img")) == 2


def test_report_loads_nothing_from_the_network(tmp_path: Path) -> None:
    _, outline = report(tmp_path, fake_run(tmp_path / "small", 1e-4))
    links = [
        (tag, value)
        for tag, attributes in outline.tags
        for key in ("src", "href", "xlink:href")
        if (value := attributes.get(key))
    ]
    assert {"video", "img", "use"} <= {tag for tag, _ in links}
    assert not [(tag, value[:80]) for tag, value in links if not value.startswith(("data:", "#"))]


def test_charts_use_the_colours_of_the_page(tmp_path: Path) -> None:
    html, _ = report(tmp_path, fake_run(tmp_path / "small", 1e-4))
    assert "currentColor" in html and "var(--rule)" in html and "prefers-color-scheme: dark" in html
    assert not re.search("#010203|#040506", html)


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "a", 1e-4), fake_run(tmp_path / "b", 3e-5, sampled=(30,))]
    html, outline = report(tmp_path, *runs)
    table = html[html.index("settings that differ") :].partition("</table>")[0]
    assert "optim.lr" in table and "0.0001" in table and "3e-05" in table
    assert "optim.betas" not in table
    assert html.count('<p class="none">none</p>') == 1, "b has no samples of step 10"
    assert len(outline.sources("video")) == 3
    assert "Ranking" not in html, "they were never evaluated"
    assert "clips seen" in html  # the common axis


def test_one_run_shows_loss_by_noise_level_over_training(tmp_path: Path) -> None:
    rows = tuple(evaluation(step, [1.0, 0.5, 0.9 / step]) for step in range(1, 21))
    html, _ = report(tmp_path, fake_run(tmp_path / "small", 1e-4, evaluations=rows))
    assert html.count("<svg") == 4 + 4 + 1, (
        "4 by sigma and frame, 1 mean over training, 1 grid, 3 training curves"
    )
    shown = [int(step) for step in re.findall(r">step (\d+)<", html)]
    assert max(shown) == 20 and len(set(shown)) == fixed_set.MAX_EVALUATIONS
    assert all(f"≈ {sigma}<" in html for sigma in ("0.01", "1", "100"))
    assert "Ranking" not in html


def test_runs_are_ranked_by_the_loss_of_their_averages(tmp_path: Path) -> None:
    losses = {"x-edm": [0.9, 0.5, 0.1], "x-cosine": [0.6, 0.3, 0.3], "x-other": [0.1, 0.1, 0.1]}
    runs = [
        fake_run(tmp_path / name, 1e-4, evaluations=(evaluation(10, [1, 1, 1]), evaluation(30, values, set_)))
        for (name, values), set_ in zip(losses.items(), ("set", "set", "another"), strict=True)
    ]
    ranking = fixed_set.rank_runs([read_run(run) for run in runs])
    assert ranking is not None
    assert [entry.run_index for entry in ranking.entries] == [1, 0], "one was evaluated on another set"
    first, second = ranking.entries
    assert (first.loss, first.low, first.middle, first.high) == pytest.approx((0.4, 0.6, 0.3, 0.3))
    assert first.above_best == 0 and second.above_best == pytest.approx(0.25)
    assert ranking.best == pytest.approx({"loss": 0.4, "low": 0.6, "middle": 0.3, "high": 0.1, "raw": 0.5})
    html, _ = report(tmp_path, *runs)
    assert "cosine has the lowest loss on the fixed set, 0.4000; edm follows, 25 % higher." in html
    assert "1 of the runs was not measured on this set." in html
    assert "<h1>x: 3 runs</h1>" in html


def test_report_explains_why_runs_on_different_sets_are_not_ranked(tmp_path: Path) -> None:
    runs = [
        fake_run(tmp_path / name, 1e-4, evaluations=(evaluation(30, [0.5] * 3, name),)) for name in ("a", "b")
    ]
    html, _ = report(tmp_path, *runs)
    assert "Ranking" not in html and "so there is no ranking" in html
    assert "so there is no ranking" not in report(tmp_path, runs[0])[0]


def test_report_warns_of_different_numbers_of_clips(tmp_path: Path) -> None:
    runs = [
        fake_run(tmp_path / str(step), 1e-4, evaluations=(evaluation(step, [0.5, 0.5, 0.5]),))
        for step in (10, 30)
    ]
    assert "different numbers of clips" in report(tmp_path, *runs)[0]


def test_common_prefix_of_names_is_removed() -> None:
    assert split_common_prefix(["lr-1e-4", "lr-3e-5"]) == ("lr", ["1e-4", "3e-5"])
    for names in (["small"], ["lr-1"], ["a-1", "b-1"], ["a-1", "a"], ["/x/a-1", "/x/a-2"]):
        assert split_common_prefix(names) == ("", names)


def test_runs_with_the_same_name_are_shown_by_path(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / folder / "small", 1e-4) for folder in ("x", "y")]
    html, _ = report(tmp_path, *runs)
    assert str(runs[0]) in html and str(runs[1]) in html


def test_sampled_steps_are_thinned_and_the_newest_is_kept(tmp_path: Path) -> None:
    html, outline = report(tmp_path, fake_run(tmp_path / "small", 1e-4, sampled=tuple(range(1, 31))))
    assert len(outline.sources("video")) == 6
    assert "Step 30<" in html and "Step 1<" in html


def test_runs_without_samples_or_steps_or_with_a_truncated_line(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "small", 1e-4, sampled=())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": NaN}\n{"step": 3')
    assert len(read_run(run).metrics) == 31
    (run / "metrics.jsonl").write_text('{"step": 1, "samples": 8, "loss": NaN}\n')
    report(tmp_path, run)
    (run / "metrics.jsonl").write_text("")
    html, _ = report(tmp_path, run)
    assert "<svg" not in html and "Samples" not in html


def test_wrong_folders_are_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run folder .*missing"):
        write_report([tmp_path / "missing"], tmp_path / "x.html")
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml"):
        write_report([tmp_path], tmp_path / "x.html")
    run = fake_run(tmp_path / "small", 1e-4, sampled=())
    (run / "config.yaml").write_bytes(b"")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        write_report([run], tmp_path / "x.html")


def test_damaged_lines_are_left_out_and_reported(tmp_path: Path) -> None:
    rows = (evaluation(10, [0.5, 0.4, 0.6]), evaluation(20, [0.4, 0.3, 0.5]))
    run = fake_run(tmp_path / "small", 1e-4, sampled=(), evaluations=rows)
    for name, bad in (
        ("metrics.jsonl", "not json\n{}\n"),
        ("evaluation.jsonl", '{"step": 5, "samples": 1}\n'),
    ):
        (run / name).write_text(bad + (run / name).read_text())
    damage = write_report([run], tmp_path / "x.html")
    assert "metrics.jsonl is damaged: 2 lines, the first is line 1" in damage[0]
    assert "evaluation.jsonl is damaged: line 1" in damage[1]
    found = read_run(run)
    assert (len(found.metrics), len(found.evaluations)) == (30, 2)


def test_smoothing_starts_unbiased_and_skips_nan() -> None:
    assert smoothed([2.0] * 100).tolist() == pytest.approx([2.0] * 100)
    line = smoothed([math.nan, 4.0, math.nan, 4.0])
    assert math.isnan(line[0]) and line[1:].tolist() == pytest.approx([4.0] * 3)
    noisy = smoothed([(-1.0) ** i for i in range(1000)])
    assert abs(noisy[-1]) < 0.1

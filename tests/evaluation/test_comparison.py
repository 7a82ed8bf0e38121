"""`detection compare`: drawn sets of images against pycocotools, intervals against detectors whose AP is known."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from detection.__main__ import main
from detection.cli import comparing
from detection.cli.comparing import same_images
from detection.cli.detected import of_file
from detection.data.records import DataError
from detection.evaluation import significance
from detection.evaluation.coco_eval import judge
from detection.evaluation.mean_ap import MeanAP
from detection.evaluation.resampling import drawn, figure_names, pooled
from detection.evaluation.results import ImageResult
from detection.evaluation.significance import compare, difference
from tests.evaluation import test_oks

LIMITS = (1, 10, 100)
CLASSES = ["a", "b", "c"]


def scenes(rng, images, objects=4.0):
    """Boxes, labels and difficulty of each image."""
    found = []
    for _ in range(images):
        count = rng.poisson(objects)
        corner, side = rng.uniform(0, 400, (count, 2)), rng.uniform(15, 140, (count, 2))
        found.append((np.concatenate([corner, corner + side], 1), rng.integers(1, 4, count), rng.normal()))
    return found


def detect(rng, world, skill, crowds=0.0):
    """A detector that finds an object the more likely the higher its skill and the easier the image."""
    found = []
    for i, (boxes, labels, hard) in enumerate(world):
        hit = rng.random(len(boxes)) < 1 / (1 + np.exp(0.5 * hard - skill))
        side = boxes[:, 2:] - boxes[:, :2]
        own = (boxes + np.tile(side, 2) * rng.normal(0, 0.07, boxes.shape))[hit]
        wrong = rng.poisson(2.0)
        corner = rng.uniform(0, 400, (wrong, 2))
        own = np.concatenate([own, np.concatenate([corner, corner + rng.uniform(15, 140, (wrong, 2))], 1)])
        own[:, 2:] = np.maximum(own[:, 2:], own[:, :2])
        scores = np.concatenate([rng.beta(4, 2, hit.sum()), rng.beta(2, 5, wrong)])
        kinds = np.concatenate([labels[hit], rng.integers(1, 4, wrong)])
        crowd = np.random.default_rng(i).random(len(boxes)) < crowds  # the same for each detector
        truth = (boxes, labels, side.prod(1), crowd, np.zeros(len(boxes), bool))
        found.append(ImageResult(i, f"{i}.png", (600, 600), own, kinds, scores, None, *truth, None))
    return found


def figures(results, weights=None):
    """The figures of the draws with these weights; of the images themselves without."""
    weights = np.ones((1, len(results)), np.int16) if weights is None else weights
    return drawn(list(judge(results, len(CLASSES))), len(CLASSES), weights, weights, LIMITS)


def as_files(results):
    """COCO annotations and results of the images, for pycocotools."""
    gt, dt = [], []
    for image, r in enumerate(results, start=1):
        for box, label, area, crowd in zip(r.gt_boxes, r.gt_labels, r.gt_areas, r.gt_iscrowd, strict=True):
            entry = {"image_id": image, "category_id": int(label), "area": float(area), "iscrowd": int(crowd)}
            gt.append(entry | {"id": len(gt) + 1, "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]})
        for box, label, score in zip(r.boxes, r.labels, r.scores, strict=True):
            entry = {"image_id": image, "category_id": int(label), "score": float(score)}
            dt.append(entry | {"bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]})
    images = [{"id": i, "width": 600, "height": 600, "file_name": f"{i}.png"} for i in range(1, len(results) + 1)]
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES, start=1)]
    return {"info": {}, "images": images, "annotations": gt, "categories": categories}, dt


@pytest.mark.parametrize("crowds", [0.0, 0.3])
def test_a_draw_is_what_pycocotools_says_of_the_images_repeated(crowds, pycoco):
    rng = np.random.default_rng(0)
    results = detect(rng, scenes(rng, 30), 1.0, crowds)
    weights = rng.multinomial(30, np.full(30, 1 / 30), 4).astype(np.int16)
    own, _ = figures(results, weights)
    for values, times in zip(own, weights, strict=True):
        wanted = pycoco(*as_files([result for result, n in zip(results, times, strict=True) for _ in range(n)]))
        said = [wanted["figures"][name] for name in figure_names(LIMITS)]
        assert values == pytest.approx([math.nan if value == -1 else value for value in said], abs=1e-9, nan_ok=True)


def repeated(gt, dt, times):
    """The files with each image as often as it says, under new numbers."""
    copies = [image["id"] for image, n in zip(gt["images"], times, strict=True) for _ in range(n)]
    images = [{"id": new, "file_name": f"{new}.png", "width": 400, "height": 300} for new in range(1, len(copies) + 1)]
    of = [
        [e | {"image_id": n} for n, old in enumerate(copies, 1) for e in es if e["image_id"] == old]
        for es in (gt["annotations"], dt)
    ]
    annotations = [entry | {"id": number} for number, entry in enumerate(of[0], start=1)]
    return gt | {"images": images, "annotations": annotations}, of[1]


def test_a_draw_of_key_points_is_what_pycocotools_says_of_the_images_repeated(tmp_path):
    gt, dt = test_oks.drawn(1, 3)
    dt = [entry | {"score": entry["score"] + k * 1e-6} for k, entry in enumerate(dt)]  # no ties: copies order them
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    (tmp_path / "dt.json").write_text(json.dumps(dt))
    run = of_file(tmp_path / "dt.json", tmp_path / "gt.json", None)
    weights = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), 4).astype(np.int16)
    own, _ = drawn(list(judge(run.results, 2, 20, sigmas=run.sigmas)), 2, weights, weights, (20,))
    for values, times in zip(own, weights, strict=True):
        wanted = test_oks.official(*repeated(gt, dt, times), run.sigmas)
        said = {name: -1 if math.isnan(v) else v for name, v in zip(figure_names((20,)), values, strict=True)}
        said["mar"] = said.pop("mar_20")
        assert {name: said[name] for name in wanted if name in said} == pytest.approx(
            {name: value for name, value in wanted.items() if name in said}, abs=1e-9
        )
        assert len(said.keys() & wanted.keys()) == 8


@pytest.mark.parametrize("folder", ["coco_fake", "coco_boxes"])
def test_the_point_is_the_evaluators_own_figure(folder, shared_data):
    files = {
        "coco_fake": ("instances_val2014_100.json", "instances_val2014_fakebbox100_results.json"),
        "coco_boxes": ("sampled_gts_bbox_area.json", "cocoapi_results.json"),
    }[folder]
    gt, dt = (shared_data / "eval_refs" / folder / name for name in files)
    run = of_file(dt, gt, None)
    metric = MeanAP(run.class_names)
    metric.update([], [], run.results)
    wanted = metric.compute()
    one = np.ones((1, len(run.results)), np.int16)
    own, classes = drawn(list(judge(run.results, len(run.class_names))), len(run.class_names), one, one, LIMITS)
    assert own[0] == pytest.approx([wanted[name] for name in figure_names(LIMITS)], abs=1e-12)
    assert own[0, 0] == pytest.approx({"coco_fake": 0.504581, "coco_boxes": 0.503647}[folder], abs=1e-6)
    known = {n: v for n, v in zip(run.class_names, classes[0].tolist(), strict=True) if not math.isnan(v)}
    assert known == pytest.approx(metric.per_class(), abs=1e-12)


def test_a_class_that_a_draw_lacks_is_left_out_of_its_mean(pycoco):
    rng = np.random.default_rng(1)
    results = detect(rng, scenes(rng, 12), 2.0)
    for i in range(1, 12):  # class c is in image 0 alone, its detections everywhere
        kept = results[i].gt_labels != 3
        fields = ("gt_boxes", "gt_labels", "gt_areas", "gt_iscrowd", "gt_difficult")
        results[i] = replace(results[i], **{name: getattr(results[i], name)[kept] for name in fields})
    assert (results[0].gt_labels == 3).any()
    weights = np.ones((2, 12), np.int16)
    weights[0, 0] = 0
    own, classes = figures(results, weights)
    assert np.isnan(classes[:, 2]).tolist() == [True, False]
    assert own[0, 0] == pytest.approx(classes[0, :2].mean())
    assert own[0, 0] == pytest.approx(pycoco(*as_files(results[1:]))["figures"]["map"], abs=1e-9)


def test_runs_in_one_list_give_each_its_own_figures():
    rng = np.random.default_rng(2)
    world = scenes(rng, 25)
    runs = [detect(rng, world, skill) for skill in (0.0, 1.0, 2.0)]
    merged = pooled([list(judge(run, 3)) for run in runs], 25)
    chosen = np.repeat(np.eye(3, dtype=np.int16), 25, axis=1)
    own, _ = drawn(merged, 3, chosen, np.ones((3, 25), np.int16), LIMITS)
    assert own == pytest.approx(np.concatenate([figures(run)[0] for run in runs]), abs=1e-12)


def test_one_run_each_gives_the_spread_of_the_draws():
    rng = np.random.default_rng(3)
    draws = rng.normal([[0.5], [0.4]], [[0.01], [0.02]], (2, 4000))
    found = difference("map", np.array([0.5, 0.4]), draws, 1, 200)
    reach = stats.t.ppf(0.975, 199) * math.hypot(0.01, 0.02)
    assert (found.high - found.low) / 2 == pytest.approx(reach, rel=0.05)
    assert found.decided and math.isnan(found.seed) and math.isnan(found.seeds_needed())


def test_without_images_it_is_the_t_test_of_the_seeds():
    a, b = np.array([0.50, 0.53, 0.51]), np.array([0.47, 0.49, 0.5, 0.46])
    measured = np.concatenate([a, b])
    found = difference("map", measured, np.repeat(measured[:, None], 50, 1), 3, 100)
    wanted = stats.ttest_ind(a, b)
    assert found.p == pytest.approx(wanted.pvalue)
    interval = wanted.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_how_many_seeds_would_decide():
    kwargs = {"name": "map", "low": -1.0, "high": 1.0, "p": 0.5, "p_images": 0.5, "draws": 9, "a": (0.1,), "b": (0.1,)}
    found = significance.Difference(difference=0.01, images=1e-6, seed=1e-4, **kwargs)
    wanted = next(n for n in range(1, 1000) if (1.959964 + 0.841621) ** 2 * (1e-6 + 2e-4 / n) <= 1e-4)
    assert found.seeds_needed() == wanted == 18
    never = replace(found, images=2e-5)
    assert never.seeds_needed() == math.inf and never.images_needed() == math.inf
    alone = replace(found, images=2e-5, seed=0.0)
    assert alone.images_needed() == pytest.approx(2e-5 * (1.959964 + 0.841621) ** 2 / 1e-4, rel=1e-4)


def covered(repeats, images, seeds=1, spread=0.0):
    """How often the interval of AP covers the true difference, and equal detectors are told apart by permutation."""
    rng = np.random.default_rng(7)
    large = scenes(rng, 12000 if repeats > 50 else 4000)
    skills = (1.3, 1.0)
    offsets = stats.norm.ppf((np.arange(8) + 0.5) / 8) * spread if spread else np.zeros(1)
    ap = [np.mean([figures(detect(rng, large, skill + own))[0][0, 0] for own in offsets]) for skill in skills]
    true = ap[0] - ap[1]
    hits = alarms = 0
    for repeat in range(repeats):
        rng = np.random.default_rng(1000 + repeat)
        world = scenes(rng, images)
        runs = [detect(rng, world, s + rng.normal(0, spread)) for s in skills for _ in range(seeds)]
        weights = rng.multinomial(images, np.full(images, 1 / images), 300).astype(np.int16)
        measured = np.array([figures(run)[0][0, 0] for run in runs])
        draws = np.stack([figures(run, weights)[0][:, 0] for run in runs])
        found = difference("map", measured, draws, seeds, images)
        hits += found.low <= true <= found.high
        if seeds == 1:
            pair = [list(judge(run, 3)) for run in (runs[1], detect(rng, world, skills[1]))]
            shuffled = significance._shuffled(pair, 1, images, 3, LIMITS, 199, rng)[:, 0]
            gap = measured[1] - drawn(pair[1], 3, *[np.ones((1, images), np.int16)] * 2, LIMITS)[0][0, 0]
            alarms += (1 + (np.abs(shuffled) >= abs(gap)).sum()) / 200 <= 0.05
    return hits / repeats, alarms / repeats


def test_the_interval_covers_the_true_difference_in_a_few_draws():
    hits, alarms = covered(repeats=20, images=60)
    assert hits >= 0.8 and alarms <= 0.2  # of 0.95 and 0.05: one in 400 and in 300 by chance


@pytest.mark.rehearsal
@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.0), (3, 0.15)])
def test_the_interval_covers_the_true_difference(seeds, spread):
    hits, alarms = covered(repeats=400, images=120, seeds=seeds, spread=spread)
    print(f"{seeds} seeds, spread {spread}: covered {hits:.3f}, false alarms {alarms:.3f}")
    assert 0.93 <= hits <= 0.97
    assert seeds > 1 or 0.03 <= alarms <= 0.07


def test_comparing_two_sides():
    rng = np.random.default_rng(4)
    world = scenes(rng, 60)
    a, b = ([detect(rng, world, skill) for _ in range(2)] for skill in (2.5, 0.5))
    found = compare(a, b, CLASSES, draws=200)
    ap = found.figures[0]
    assert ap.name == "map" and ap.decided and ap.p < 0.01 and ap.p_images == pytest.approx(1 / 201)
    assert ap.a == pytest.approx([figures(run)[0][0, 0] for run in a])
    assert [row.name for row in found.classes] == CLASSES and len(found.adjusted) == 3
    missed = found.mistakes[-1]
    assert missed.name == "missed" and missed.high < 0 and found.delta_ap["missed"] < 0
    wrong = [significance.mistake_weight(judged, 60).sum() for judged in (found.judged_b, found.judged_a)]
    assert wrong[0] > wrong[1] and found.change.sum() > 0
    back = compare(b, a, CLASSES, draws=200)
    assert back.figures[0].difference == pytest.approx(-ap.difference) and back.change == pytest.approx(-found.change)
    same = compare(a[:1], [list(a[0])], CLASSES, draws=100)
    assert same.figures[0].difference == 0 and same.figures[0].p_images == 1 and not same.figures[0].decided


@pytest.fixture
def files(tmp_path):
    """Annotations, and results files of a good and a bad detector, two runs each."""
    rng = np.random.default_rng(5)
    world = scenes(rng, 40)
    for name, skill in (("good", 2.5), ("bad", 0.5)):
        for run in range(2):
            gt, dt = as_files(detect(rng, world, skill))
            (tmp_path / f"{name}{run}.json").write_text(json.dumps(dt))
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    return tmp_path


def test_the_command_on_results_files(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    runs = ["good0.json", "good1.json", "--against", "bad0.json", "bad1.json"]
    assert not main(["compare", *runs, "--gt", "gt.json", "--draws", "200", "--output", "out"])
    said = capsys.readouterr().out
    assert "good0.json is better than bad0.json (good0.json - bad0.json: +" in said
    assert re.search(r"^AP +0\.\d{3} ±0\.\d{3} +0\.\d{3} ±0\.\d{3} +\+0\.\d{3} +\+0\.\d{3} to \+0\.\d{3} ", said, re.M)
    content = json.loads((files / "out" / "comparison.json").read_text())
    assert content["figures"][0]["name"] == "map" and content["figures"][0]["decided"] and content["images"] == 40
    assert {row["name"] for row in content["classes"]} == set(CLASSES) and len(content["images_changed"]) == 40
    page = (files / "out" / "comparison.html").read_text()
    heads = re.findall(r'<th[^>]*><button type="button">([^<]*)<', page.partition("<h2>Figures</h2>")[2])[:7]
    row = dict(zip(heads, re.findall(r'<td[^>]* data-value="([^"]*)">', page), strict=False))
    ap = content["figures"][0]
    assert (row["figure"], float(row["A - B"]), float(row["interval"])) == ("map", ap["difference"], ap["low"])
    assert (float(row["A"]), float(row["p images"])) == (np.mean(ap["a"]), ap["p_images"])
    assert "http" not in page.replace("http://www.w3.org", "") and page.count('class="whisker') == 12 + 3 + 6


def test_the_command_on_key_points(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gt, good = test_oks.drawn(0, 3)
    moved = [[v + 9 * (k % 3 == 0) for k, v in enumerate(entry["keypoints"])] for entry in good]
    bad = [entry | {"keypoints": points} for entry, points in zip(good, moved, strict=True)]
    for name, content in (("gt", gt), ("good", good), ("bad", bad)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert not main(["compare", "good.json", "bad.json", "--gt", "gt.json", "--keypoints", "--draws", "100"])
    assert "good is better than bad (good - bad: +" in capsys.readouterr().out
    content = json.loads((tmp_path / "comparison_good_bad" / "comparison.json").read_text())
    names = ["map", "map_50", "map_75", "map_medium", "map_large", "mar_20", "mar_medium", "mar_large"]
    assert content["compared"] == "key points" and [row["name"] for row in content["figures"]] == names
    for side, found in (("a", good), ("b", bad)):
        wanted = test_oks.official(gt, found, (0.05,) * 3)
        said = {row["name"]: row[side][0] for row in content["figures"]}
        assert said["mar_20"] == pytest.approx(wanted["mar"], abs=1e-9)
        assert {name: said[name] for name in names[:5]} == pytest.approx(
            {name: None if wanted[name] == -1 else wanted[name] for name in names[:5]}, abs=1e-9
        )
    page = (tmp_path / "comparison_good_bad" / "comparison.html").read_text()
    assert "compared <b>key points</b>" in page and page.count("Of the boxes, not of the key points.") == 2


def test_other_key_points_or_sigmas_are_not_compared(tmp_path, monkeypatch):
    gt, dt = test_oks.drawn(0, 3)
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    (tmp_path / "dt.json").write_text(json.dumps(dt))
    run = of_file(tmp_path / "dt.json", tmp_path / "gt.json", None)
    with pytest.raises(DataError, match=r"other key points, or other sigmas .*\(0\.1, 0\.1, 0\.1\).*keypoint_sigmas"):
        comparing.shared_sigmas([run, replace(run, sigmas=(0.1,) * 3)])
    points = [replace(own, gt_keypoints=own.gt_keypoints + 1) for own in run.results]
    with pytest.raises(DataError, match="other validation sets"):
        same_images([[run], [replace(run, results=points)]])


def test_one_run_each_says_that_seeds_are_unknown(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    assert not main(["compare", "good0.json", "good1.json", "--gt", "gt.json", "--draws", "100"])
    said = capsys.readouterr().out
    assert "within noise" in said and "nothing is known of other seeds" in said
    assert (files / "comparison_good0_good1" / "comparison.html").is_file()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["good0.json"], "1 run and no --against: give two, or the seeds of each"),
        (["good0.json", "good1.json", "bad0.json"], "3 runs and no --against"),
        (["good0.json", "bad0.json"], "good0.json: name the COCO file that the results are compared with: --gt"),
        (["good0.json", "good0.json", "--gt", "gt.json"], "is on both sides: a run can't differ from itself"),
        (["good0.json", "bad0.json", "--gt", "gt.json", "--masks"], "--masks compares masks, but not all runs have"),
        (["good0.json", "bad0.json", "--gt", "gt.json", "--keypoints"], "--keypoints compares key points, but not all"),
        (["good0.json", "bad0.json", "--gt", "gt.json", "--draws", "5"], "--draws is 5: it must be at least 100"),
        (["absent", "bad0.json"], "no checkpoint at absent"),
    ],
)
def test_what_is_refused(args, said, files, monkeypatch):
    monkeypatch.chdir(files)
    complaint = main(["compare", *args])
    assert isinstance(complaint, str) and said in complaint and "\n" not in complaint


def test_other_validation_sets_are_refused_or_their_common_images_taken(files):
    gt = json.loads((files / "gt.json").read_text())
    moved = next(entry for entry in gt["annotations"] if entry["image_id"] == 3)
    moved["bbox"][0] += 5
    gt["images"] = [image for image in gt["images"] if image["id"] > 2]
    gt["annotations"] = [entry for entry in gt["annotations"] if entry["image_id"] > 2]
    (files / "other.json").write_text(json.dumps(gt))
    found = [entry for entry in json.loads((files / "bad0.json").read_text()) if entry["image_id"] > 2]
    (files / "bad.json").write_text(json.dumps(found))
    a, b = (
        of_file(files / "good0.json", files / "gt.json", None),
        of_file(files / "bad.json", files / "other.json", None),
    )
    with pytest.raises(DataError, match=r"other validation sets \(38 and 40 images, 37 the same .*--common"):
        same_images([[a], [b]])
    with pytest.raises(DataError, match=r"other validation sets \(40 and 38 images"):
        same_images([[b], [a]])
    for side in same_images([[a], [b]], common=True):
        assert [result.image_id for result in side[0].results] == list(range(4, 41))
    with pytest.raises(DataError, match="other classes"):
        same_images([[a], [replace(b, class_names=["x"])]])


def test_a_figure_that_no_draw_has_is_said_to_be_none():
    """Two seeds each, and no small object: there is no mean of no draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = difference("map_small", np.full(4, np.nan), np.full((4, 50), np.nan), 2, 4)
    assert math.isnan(found.difference) and math.isnan(found.seed) and found.draws == 0

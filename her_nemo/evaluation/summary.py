"""A benchmark's figures as lines of text: every mean with its interval, failures beside the scores."""

from __future__ import annotations

from her_nemo.evaluation.results import Metric, Results


def summary(results: Results) -> str:
    """What a stage prints when it is done."""
    title = f"{results.name}: {results.benchmark}, protocol {results.protocol}, {results.scenes} scenes"
    lines = [title + (f" x {results.runs} runs" if results.runs > 1 else "")]
    width = max((len(metric.name) for metric in results.metrics), default=0)
    lines += [f"  {metric.name:{width}}  {metric_text(metric)}" for metric in results.metrics]
    if results.failures:
        counted = [
            f"{role} {kind.replace('_', ' ')} {count}"
            for role, kinds in results.failures.items()
            for kind, count in kinds.items()
        ]
        lines.append(f"  failures: {', '.join(counted)}")
    if not results.valid:
        lines.append(f"  INVALID: {why_invalid(results)}")
    return "\n".join(lines)


def metric_text(metric: Metric) -> str:
    """`71.3 [65.0, 77.1]  (2 missing)`: mean, interval, and how many scenes have no value."""
    interval = metric.interval
    missing = f"  ({metric.missing} missing)" if metric.missing else ""
    if interval is None:
        return f"no value{missing}"
    digits = 1 if abs(interval.mean) >= 1 or metric.group == "judge" else 3
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.{digits}f} (one scene: no interval){missing}"
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]{missing}"


def why_invalid(results: Results) -> str:
    """What makes a result invalid, in words."""
    limit = f"more than max_failure_share = {results.max_failure_share:.0%}"
    said = []
    if results.judge_failure_share > results.max_failure_share:
        failed = f"{results.judgements_failed} of {results.judgements} judgements"
        said.append(f"{failed} failed ({results.judge_failure_share:.0%}, {limit})")
    if results.simulation_failure_share > results.max_failure_share:
        failed = f"{results.simulations_failed} of {results.scenes * results.runs} dialogues"
        said.append(f"{failed} could not be played ({results.simulation_failure_share:.0%}, {limit})")
    return "; ".join(said) or "nothing was measured"

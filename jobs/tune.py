"""Searches learning rates and more: ``python jobs/tune.py RECIPE [options]``; ``--help`` lists both."""

import sys

from distmaml import cli, findings, paths, report, study


def main() -> int:
    """Parses, searches, prints the trials and the best of them."""
    config, search = cli.parse_search(sys.argv[1:], prog="jobs/tune.py", description=__doc__)
    found = study.tune(config, search)
    print()
    print(findings.table(found.trials, config.evaluation))
    best = findings.shown(config.evaluation, found.best.best(config.evaluation.selection_mode))
    print(f"\nbest      {found.config.run.name}: {found.config.evaluation.selected_quantity} {best} in validation")
    if found.scores:
        print(f"\nTest on {config.evaluation.num_test_episodes} episodes of {report.data_of(config, 'test')}:")
        print(report.table(found.scores))
    print(f"\npictures  {paths.artifacts(found.folder)}")
    print(f"train it  python jobs/train.py --recipe-file {paths.champion(found.folder)}")
    if found.registered:
        print(f"registry  {found.registered}")
    print(cli.compare(found.compare))
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main))

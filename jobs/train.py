"""Meta-trains one model: ``python jobs/train.py RECIPE [options]``; ``--help`` lists both."""

import sys

from distmaml import cli, driver, paths, report


def main() -> int:
    """Parses, trains, prints the result."""
    config = cli.parse_recipe(sys.argv[1:], prog="jobs/train.py", description=__doc__)
    outcome = driver.train(config)
    if outcome.scores:
        print(f"\nTest on {config.evaluation.num_test_episodes} episodes of {report.data_of(config, 'test')}:")
        print(report.table(outcome.scores))
    print(f"\nmodel     {paths.model(outcome.folder)}")
    print(f"pictures  {paths.artifacts(outcome.folder)}")
    print(cli.compare(outcome.compare))
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main))

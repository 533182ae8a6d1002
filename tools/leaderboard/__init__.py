"""The lab's board: results that were checked before they were believed.

    submission.py     run directories -> a small JSON record, and the evidence it rests on
    evidence.py, modded_logs.py, data_manifest.py
                      the readers: our run directories, modded-nanogpt's public logs, which tokens were read
    run_checks.py, clock_checks.py, group_checks.py
                      what may be wrong with a run, with its times, with all runs together
    verify.py         all checks over one submission: accepted, or refused with every reason
    board.py          the folder of records, written by many at once
    pages.py, charts.py   the static page

docs/leaderboard.md has the rules.
"""

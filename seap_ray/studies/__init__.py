"""Studies: questions about pruning, each answered by one command on one set of statistics.

A study is a row of ``methods.STUDIES``; a file here with ``run(runner) -> StudyResult``, and ``check(config)`` where
not every config will do; a line of ``run.RUNS``; and a row type in ``report.study_rows``.
"""

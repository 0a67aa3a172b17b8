"""The pipeline of one task: submit -> lane -> batch -> forward -> settle.

`celery -A tasks` finds the app in `tasks.celery`.
"""

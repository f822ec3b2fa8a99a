"""Corpora: small corpus files, and tasks that read them."""

from seap_ray.tasks import Task


def task(path, **keys):
    return Task(name="mine", path=str(path), answer="{{ text }}", **keys)

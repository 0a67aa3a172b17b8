"""gunicorn: its worker class and the short way of plain predicts."""

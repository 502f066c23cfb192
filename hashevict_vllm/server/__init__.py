"""HTTP routes under ``/v1/kv_policy``, and the page that shows what is kept."""

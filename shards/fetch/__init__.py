"""`python -m shards fetch`: public data sets from where they are published."""

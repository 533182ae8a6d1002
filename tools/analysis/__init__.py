"""What finished runs prove: tables, tests, comparisons, pictures and the report (`engaging analyze|compare|report`)."""

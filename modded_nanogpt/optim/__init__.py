"""The speedrun's optimizers: NorMuon for matrices, Adam for everything else, cut over the ranks.

`table` says what each parameter gets, `adam` and `normuon` hold the equations, `orthogonalize` Muon's matrix iteration,
`averaging` what the weights become after the last step, `exchange` moves one parameter between ranks, `sharded` puts
the step together: trainers use `sharded.Optimizer`.
"""

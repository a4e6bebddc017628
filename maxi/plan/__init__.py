"""`maxi plan`: whether a config fits hardware that need not be here, how long its run takes and what it costs.

    command.py    the command: what was asked, what is chosen and why, what is printed
    run.py        how far a run goes, and what an estimate makes of it: hours and money
    compiled.py   one layout on one topology, counted or compiled
    meter.py      seconds, from the program that libtpu made
    parts.py      memory by part, from its live ranges
    hlo.py        the text of a program, read
    search.py     layouts: counted all, compiled the best
    goals.py      topologies: the cheapest that is in time or within a budget
    report.py     tables for people, one object for programs
    h100.txtpb    XLA's description of an H100, to compile for one

What is counted (`maxi/estimate`) and what was compiled is marked in all that is printed.
"""

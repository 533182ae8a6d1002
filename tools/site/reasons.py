"""SLURM's reasons and ends, and our trainers' exit statuses, in words: a table for `engaging why`.

Remedies may name {id}, {log}, {more}, and what `why` fills in from the cluster: {gpus} {cpus} {memory}
{time} {fits} {group} {window} {more_memory}.
"""

YOURS, CLUSTER, JOB, ADMIN = "your own limit", "the cluster is busy", "the job itself", "the cluster's staff"

# reason (lower case, a prefix): (whose it is, the reason in words, what to do)
REASONS: tuple[tuple[str, str, str, str], ...] = (
    ("none", CLUSTER, "SLURM has not looked at it yet", "wait a minute and ask again"),
    ("priority", CLUSTER, "jobs of higher priority stand before it", "wait, or ask for less: shorter --time"),
    ("resources", CLUSTER, "it is next, and waits for enough free GPUs or cores", "wait, or ask for less"),
    ("begintime", JOB, "it may not start before a set time (a requeue waits about two minutes)", "wait"),
    (
        "jobarraytasklimit",
        JOB,
        "the array's own throttle is reached",
        "scontrol update JobId={id} ArrayTaskThrottle={more}",
    ),
    (
        "dependencyneversatisfied",
        JOB,
        "the job it waits for has failed, so it will never start",
        "scancel {id}; mend the first job, submit both again",
    ),
    (
        "dependency",
        JOB,
        "it waits for another job to end",
        "wait, or scontrol update JobId={id} Dependency= to free it",
    ),
    ("jobheldadmin", ADMIN, "an administrator holds it", "ask the cluster's staff"),
    ("jobhelduser", JOB, "it is held", "scontrol release {id}"),
    ("job_held", JOB, "it is held", "scontrol release {id}"),
    (
        "launch_failed_requeued_held",
        JOB,
        "it could not be started on its node and is held now",
        "scontrol release {id}; if it comes again, --exclude that node and tell the staff",
    ),
    ("job_requeued_held", JOB, "it was requeued and is held", "scontrol release {id}"),
    ("partitiontimelimit", JOB, "its --time is over the partition's limit", "{time}"),
    (
        "partitionnodelimit",
        JOB,
        "it asks for more nodes than the partition allows",
        "scontrol update JobId={id} NumNodes=1",
    ),
    ("partitiondown", ADMIN, "the partition is closed", "wait, or another --partition (engaging plan)"),
    ("partitioninactive", ADMIN, "the partition is inactive", "wait, or another --partition (engaging plan)"),
    ("partitionconfig", JOB, "the partition can never take it", "{fits}"),
    (
        "reqnodenotavail",
        CLUSTER,
        "its nodes are down, drained or reserved, often for a maintenance before the job would end",
        "{window}",
    ),
    ("nodedown", CLUSTER, "a node it needs is down", "wait, or leave out --nodelist"),
    ("badconstraints", JOB, "no node has what it asks for", "{fits}"),
    ("reservation", JOB, "it waits for its reservation to begin", "wait, or submit without --reservation"),
    (
        "invalidaccount",
        YOURS,
        "its account is not valid",
        "--account and --qos together (engaging doctor lists yours)",
    ),
    ("invalidqos", YOURS, "its QOS is not open to you", "--qos (engaging doctor lists yours)"),
    ("accountingpolicy", YOURS, "a limit of your account", "engaging plan shows your limits"),
    ("qosmaxgresperuser", YOURS, "the GPUs one user may hold", "{gpus}"),
    ("qosmaxgresperjob", YOURS, "the GPUs one job may hold", "{gpus}"),
    ("qosmaxcpuperuser", YOURS, "the cores one user may hold", "{cpus}"),
    ("qosmaxcpuper", YOURS, "the cores one job may hold", "{cpus}"),
    ("qosmaxmemory", YOURS, "the memory one user or job may hold", "{memory}"),
    ("qosmaxnode", YOURS, "the nodes one user or job may hold", "scontrol update JobId={id} NumNodes=1"),
    ("qosmaxjobsper", YOURS, "the number of jobs you may run at once", "wait for one of yours to end"),
    ("qosmaxsubmit", YOURS, "the number of jobs you may have in the queue", "wait, or cancel some"),
    ("qosmaxwall", YOURS, "its --time is over the QOS's limit", "{time}"),
    (
        "qosgrp",
        YOURS,
        "a limit that your whole group shares is reached: others of the group hold the rest",
        "{group}",
    ),
    ("qosmingres", YOURS, "the QOS wants more GPUs a job than it asks for", "--gpus as the QOS says"),
    ("qosnotallowed", YOURS, "the partition does not take its QOS", "--qos or --partition (engaging plan)"),
    ("qos", YOURS, "a limit of its QOS", "engaging plan shows your limits"),
    (
        "assocmaxjobs",
        YOURS,
        "the number of jobs your account lets you run at once",
        "wait for one of yours to end",
    ),
    ("assocmaxgres", YOURS, "the GPUs your account lets you hold", "{gpus}"),
    ("assocmaxcpu", YOURS, "the cores your account lets you hold", "{cpus}"),
    (
        "assocgrp",
        YOURS,
        "a limit that everybody on your account shares is reached",
        "wait, or another --account",
    ),
    ("assoc", YOURS, "a limit of your account", "engaging plan shows your limits"),
    (
        "maxgresperaccount",
        YOURS,
        "the GPUs everybody on your account may hold together",
        "wait, or another --account",
    ),
    ("licenses", CLUSTER, "it waits for a licence", "wait"),
    ("frontenddown", CLUSTER, "a front-end is down", "wait"),
    ("cleaning", CLUSTER, "its last attempt is still being cleaned up", "wait"),
    ("prolog", CLUSTER, "the node prepares itself", "wait"),
)

# how a job ended: (in words, what to do)
ENDS = {
    "COMPLETED": ("it ended well", "engaging usage {id}"),
    "FAILED": ("its program ended with an error", "read the log's end: {log}"),
    "CANCELLED": ("somebody cancelled it", "launch the same name again: it goes on from the last checkpoint"),
    "TIMEOUT": (
        "it reached its --time and was not requeued",
        "launch the same name again, or a longer --time",
    ),
    "OUT_OF_MEMORY": ("it used more host memory than it asked for", "{more_memory}"),
    "NODE_FAIL": ("its node failed", "launch the same name again; --exclude the node if it comes twice"),
    "PREEMPTED": (
        "the node's owner needed it",
        "it is requeued by itself when it was submitted with --requeue",
    ),
    "BOOT_FAIL": ("its node did not boot", "submit it again"),
    "DEADLINE": ("it could not end before its deadline", "submit it again without --deadline"),
}

# exit status of a trainer or its shell: (in words, what to do)
EXITS = {
    "2": ("its trainer refused a flag, a preset or the data", "the log's last line names it: {log}"),
    "70": (
        "the loss or a gradient became NaN or infinite",
        "a smaller --learning_rate; the last checkpoint is good",
    ),
    "74": ("the disk or a quota is full, or the file system failed", "engaging doctor names the quota"),
    "75": (
        "it was interrupted after it had saved, and may not requeue itself",
        "the same line again goes on with it; the log's end says why it stopped: {log}",
    ),
    "76": (
        "a newer attempt owns the run; this one stopped without touching it",
        "nothing: the newer one goes on",
    ),
    "127": ("a program was not found: the environment is missing on the node", "bash setup_env.sh"),
    "134": ("a program in it aborted", "the log's end says which: {log}"),
    "139": (
        "a program in it crashed (segmentation fault)",
        "engaging doctor, in a job too; the log's end: {log}",
    ),
    "137": ("it was killed, often for its memory", "{more_memory}; the log may say otherwise: {log}"),
}

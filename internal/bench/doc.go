// Command bench measures the server and the client, and checks what they answer while it does.
// Without -server it starts both, and what they are compared with, in network namespaces of their
// own: see make bench. With -server it loads a server that runs here, any that speaks the protocol,
// the C original included, and releases all leases that it was granted.
//
// # What is checked
//
// No two keys have one table, a renewal keeps its table, every request has one reply, every reply
// belongs to a request, and at the end the database has the leases that the clients were told of.
// Only a fault of these makes the exit code 1. How fast something is, bench prints together with what the
// project wants, and judges nothing.
//
// # Why ratios
//
// A machine is seldom idle, so a rate alone says little. The rates of the server are divided by
// those of an echo server, which does what no server can do without: it receives and sends, with
// the same sockets and under the same load. Echo and server take turns of 100 ms, one after the
// other, so that both meet the same disturbances, and each ratio is the median of such pairs. Look
// at ratios and at processor time.
//
// # The load
//
// One thread has a socket for each client. It shares the processors with the server, so a load
// generator that costs more would hide what the server costs. The queue of the server's socket
// holds ten datagrams, as on any system; a client that finds it full waits for room, as a send that
// blocks does. In the boot storm each caller is a goroutine, and waits as our client does.
//
// # The C original
//
// -original names a directory with table_allocator_server and table_allocator_client, or with other
// programs of these names and options. They take turns with ours, under the same load, with 1,000
// leases held on the same disk. The original stores seconds: it writes nothing for a renewal within
// the second of the one before, so the load renews a key of its at least 1.1 seconds later. Ours,
// which stores renewals later, gets no such pause. The log of the original goes to /dev/null, because
// nothing turns it off, ours to a file.
//
// The clients have network namespaces of their own. A boot storm lasts ten seconds at most; the
// callers of both servers ask as our client does, and once more those of the original as its own
// client does, five times, two seconds apart. The original prints the table before it has added the
// rules, ours afterwards. After an address is deleted, the rules that are left are counted. What the
// original answers wrongly, loses or refuses is counted and printed, and does not fail the run.
//
// A watch beside a large main has leases of 20 s, which is less than what it does there may take. One that is lost is a fault.
//
// # Where the time goes
//
// A renewal is mostly system calls: recvmmsg and sendmmsg of all datagrams that wait. Decoding
// allocates nothing and uses no reflection; the index takes 0.1 us. Of a new lease, with 16 clients,
// a third is SQLite, a quarter receiving and sending, an eighth decoding and deciding, an eighth the
// line in the log, and the rest Go's runtime. SQLite takes 4 us for a row and 40 us for a
// transaction, whatever is in it, so one transaction takes all requests that have come. Each loop of
// the server waits within recvmmsg: a wait in Go's poller takes three more system calls for each
// datagram that comes alone. One processor does all of it.
//
// A client is two starts of one program, with 90 system calls between them and the table on stdout.
// At rest it sleeps, and the monitor thread of Go's runtime wakes once a minute. Until then it has
// less garbage than a collection would need memory, so there is no collection below 1.5 MiB.
package main

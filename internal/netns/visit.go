package netns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/table-allocator/table-allocator/internal/outside"
)

// maxAnswer is the size of one message of the service, in bytes.
const maxAnswer = 64 << 10

// ask asks the service, for a user who cannot look. each is called for each message of the answer until it reports the end.
func ask(ctx context.Context, question string, each func(message []byte) (end bool, err error)) error {
	conn, err := (&net.Dialer{Timeout: doorPatience}).DialContext(ctx, "unixpacket", DoorPath)
	if err != nil {
		return fmt.Errorf("ask the service of namespaces: %w (%s; root and its group may ask)", err, outside.Service("start", "table-allocator-netns"))
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * doorPatience)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte(question)); err != nil {
		return fmt.Errorf("ask the service of namespaces: %w", err)
	}
	message := make([]byte, maxAnswer)
	for {
		n, err := conn.Read(message)
		if err != nil {
			return fmt.Errorf("the service of namespaces does not answer: %w", err)
		}
		if end, err := each(message[:n]); end || err != nil {
			return err
		}
	}
}

// Leased asks the service whether the uplink of a namespace has a lease.
func Leased(ctx context.Context, name string) (leased bool, err error) {
	err = ask(ctx, "leased "+name, func(message []byte) (bool, error) {
		text, parseErr := string(message), error(nil)
		if leased, parseErr = strconv.ParseBool(text); parseErr != nil {
			return false, named(name, errors.New(text))
		}
		return true, nil
	})
	return leased, err
}

// Mine asks the service for the namespaces that this user may enter, each with this user's programs.
func Mine(ctx context.Context) ([]Row, error) {
	rows, err := several[Row](ctx, "list ")
	if err != nil {
		return nil, err
	}
	programs, err := MyPrograms(ctx, "")
	for i := range rows {
		for _, p := range programs {
			if p.Namespace == rows[i].Name {
				rows[i].Programs = append(rows[i].Programs, p)
			}
		}
	}
	return rows, err
}

// MyPrograms asks the service for this user's programs in a namespace, or with "" in all of them.
func MyPrograms(ctx context.Context, name string) ([]Program, error) {
	programs, err := several[Program](ctx, "ps "+name)
	if name != "" {
		err = named(name, err)
	}
	return programs, err
}

func several[T any](ctx context.Context, question string) ([]T, error) {
	rows := []T{}
	err := ask(ctx, question, func(message []byte) (bool, error) {
		if string(message) == theEnd {
			return true, nil
		}
		var row T
		if json.Unmarshal(message, &row) != nil {
			return false, errors.New(string(message))
		}
		rows = append(rows, row)
		return false, nil
	})
	return rows, err
}
